# ctest cases from core/src/cuda/sm90/budgets.toml, none of which needs a GPU: kernel_budget.<file> reads what ptxas said when the file was
# compiled, kernel_sass.<file> reads its machine code. The latter needs cuobjdump: part of the CUDA toolkit, or the package
# nvidia-cuda-cuobjdump from PyPI (set MLAKIT_CUOBJDUMP to the program).
find_program(MLAKIT_CUOBJDUMP cuobjdump HINTS ${CUDAToolkit_BIN_DIR} DOC "cuobjdump, for the SASS tests")
set(_budgets ${PROJECT_SOURCE_DIR}/core/src/cuda/sm90/budgets.toml)
set(_objects ${CMAKE_BINARY_DIR}/kernel_objects.txt)
file(GENERATE OUTPUT ${_objects} CONTENT "$<JOIN:$<TARGET_OBJECTS:mlakit_objects>;$<TARGET_OBJECTS:mlakit_gpu_probe>,\n>\n")
file(STRINGS ${_budgets} _files REGEX "^\\[.*\\]$")
foreach(_file IN LISTS _files)
  string(REGEX REPLACE "[][]" "" _file ${_file})
  foreach(_kind budget sass)
    add_test(NAME kernel_${_kind}.${_file}
      COMMAND ${CMAKE_COMMAND} -DKIND=${_kind} -DFILE=${_file} -DBUDGETS=${_budgets} -DOBJECTS=${_objects} -DCUOBJDUMP=${MLAKIT_CUOBJDUMP}
              -P ${PROJECT_SOURCE_DIR}/cmake/check_kernel_budget.cmake)
    set_tests_properties(kernel_${_kind}.${_file} PROPERTIES LABELS unit SKIP_REGULAR_EXPRESSION "cuobjdump was not found")
  endforeach()
endforeach()
