"""Multi-head Latent Attention (MLA) decode over a paged KV cache, on any DLPack tensor. Start with `mla_decode`."""

from ._backends import Backend, backends, get_cmake_dir, get_include, get_library_path
from ._decode import clear_plan_cache, merge_states, mla_decode, plan_cache_info
from ._ext import version as _version
from ._paging import PagedCache, make_block_table, paged_from_contiguous
from ._plan import Context, Plan, PlanInfo, Schedule
from ._problem import Problem
from ._shared_prefix import decode_shared_prefix

__version__ = _version()

__all__ = [
    "Backend",
    "Context",
    "PagedCache",
    "Plan",
    "PlanInfo",
    "Problem",
    "Schedule",
    "__version__",
    "backends",
    "clear_plan_cache",
    "decode_shared_prefix",
    "get_cmake_dir",
    "get_include",
    "get_library_path",
    "make_block_table",
    "merge_states",
    "mla_decode",
    "paged_from_contiguous",
    "plan_cache_info",
]
