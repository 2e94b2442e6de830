# mla_add_test(name SOURCES file... [LABELS label...] [LINK target...] [ENVIRONMENT var=value...]): one doctest executable, one ctest case.
# It sees the library's internals, and uses cpp_tests/doctest_main.cc for main().
function(mla_add_test name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "SOURCES;LABELS;LINK;ENVIRONMENT")
  add_executable(${name} ${arg_SOURCES})
  mla_target_options(${name})
  target_link_libraries(${name} PRIVATE mlakit_objects doctest_main ${arg_LINK})
  add_test(NAME ${name} COMMAND ${name})
  set_tests_properties(${name} PROPERTIES LABELS "${arg_LABELS}" ENVIRONMENT "${arg_ENVIRONMENT}")
endfunction()
