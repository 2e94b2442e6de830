# Installs the library into a fresh prefix, moves the prefix, and builds and runs the example engines against it: by find_package (a
# project in C alone, and one with C++) and by pkg-config, shared and static. All have to print the same lines.
#
#     cmake -DBUILD_DIR=... -DSOURCE_DIR=... -DWORK_DIR=... -DCC=... -DGENERATOR=... -P install_test.cmake
function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${ARGN}\n${output}")
  endif()
  set(output "${output}" PARENT_SCOPE)
endfunction()

# Runs an engine and compares its lines with those of the first.
function(run_engine)
  run(${CMAKE_COMMAND} -E env LD_LIBRARY_PATH=${libdir} ${ARGN})
  get_property(expected GLOBAL PROPERTY expected)
  if(NOT expected)
    set_property(GLOBAL PROPERTY expected "${output}")
    message(STATUS "${output}")
  elseif(NOT output STREQUAL expected)
    message(FATAL_ERROR "${ARGN} printed\n${output}\nbut the first engine printed\n${expected}")
  endif()
endfunction()

file(REMOVE_RECURSE ${WORK_DIR})
run(${CMAKE_COMMAND} --install ${BUILD_DIR} --prefix ${WORK_DIR}/first)
file(RENAME ${WORK_DIR}/first ${WORK_DIR}/moved)
file(GLOB_RECURSE config_file ${WORK_DIR}/moved/*/mlakitConfig.cmake)
cmake_path(GET config_file PARENT_PATH config_dir)
cmake_path(APPEND config_dir ../.. OUTPUT_VARIABLE libdir)
cmake_path(NORMAL_PATH libdir)

foreach(with_cxx OFF ON)
  set(build ${WORK_DIR}/consumer-${with_cxx})
  run(${CMAKE_COMMAND} -S ${SOURCE_DIR}/consumer -B ${build} -G ${GENERATOR} -DCMAKE_C_COMPILER=${CC} -DCMAKE_BUILD_TYPE=Release
      -DCMAKE_PREFIX_PATH=${WORK_DIR}/moved -DWITH_CXX=${with_cxx})
  run(${CMAKE_COMMAND} --build ${build})
  run_engine(${build}/engine_c)
  run_engine(${build}/engine_c_static)
  if(with_cxx)
    run_engine(${build}/engine_cxx)
    run_engine(${build}/engine_cxx_static)
  endif()
endforeach()

find_program(PKG_CONFIG pkg-config REQUIRED)
foreach(package mlakit mlakit_static)
  run(${CMAKE_COMMAND} -E env PKG_CONFIG_PATH=${libdir}/pkgconfig ${PKG_CONFIG} --cflags --libs ${package})
  separate_arguments(flags UNIX_COMMAND "${output}")
  run(${CC} -std=c99 ${SOURCE_DIR}/engine_example.c -o ${WORK_DIR}/engine_${package} ${flags})
  run_engine(${WORK_DIR}/engine_${package})
endforeach()

get_property(expected GLOBAL PROPERTY expected)
if(NOT expected MATCHES "request 1 token 0 head 3 lse -inf out\\[0\\] 0.00000")
  message(FATAL_ERROR "the empty request has to come out as zeros:\n${expected}")
endif()
