/* The version of mlakit, written here once; CMake, the wheel and the library read it from this file. */
#ifndef MLAKIT_VERSION_H
#define MLAKIT_VERSION_H

#define MLAKIT_VERSION_MAJOR 0
#define MLAKIT_VERSION_MINOR 1
#define MLAKIT_VERSION_PATCH 0
#define MLAKIT_VERSION_STRING "0.1.0"

#endif
