// Intel's intrinsics for a variant file. Some of GCC's own definitions in there read a value that
// they leave undefined on purpose, and GCC warns of each use; a warning of ours would drown.
#pragma once
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
