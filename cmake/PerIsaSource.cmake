# Sources compiled for one instruction set and chosen at run time.
#
# mla_add_isa_source(target file flag...): adds the file to the target with its own flags. It is optimised in every build type (the
# vector code is of no use otherwise). What such a file may export is tested: see cpp_tests/backend/CMakeLists.txt.
function(mla_add_isa_source target file)
  target_sources(${target} PRIVATE ${file})
  # GCC 12's own AVX-512 header trips its uninitialised-value warning.
  set_property(SOURCE ${file} TARGET_DIRECTORY ${target} APPEND PROPERTY COMPILE_OPTIONS ${ARGN} -O3 $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>)
endfunction()
