"""Other libraries' calling conventions on top of mlakit: change the import, keep the call. Needs torch.

`flash_mla` (DeepSeek's FlashMLA and its forks), `flash_attn` (FlashAttention-3's call with q_v), `flashinfer` (plan and run).
"""
