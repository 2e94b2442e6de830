# The CUDA language for sm_90a only, with the runtime linked statically. The -gencode form is written out: wgmma and setmaxnreg
# exist for the "a" target only.
set(CMAKE_CUDA_ARCHITECTURES OFF)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know yet that nvcc takes C++20
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
endif()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
find_package(CUDAToolkit REQUIRED)
set(MLAKIT_CUDA_FLAGS "SHELL:-gencode arch=compute_90a,code=sm_90a" -Xptxas=-v,-warn-spills -lineinfo)
