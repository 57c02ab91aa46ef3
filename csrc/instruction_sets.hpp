// Includes the text ICEGRT_TEXT in the namespaces plain, avx2 and avx512, compiled for the instruction set of each, with
// the vectors of lanes.hpp. The caller is in namespace icegrt. ICEGRT_FOR_THIS_CPU(name) is the name in the namespace of
// the set that instruction_set() names.
//
// GCC 12 lowers vectors before it clones a function (target_clones), to those of the default set: the whole text has to
// be compiled under each. A text has no lambdas, which do not take the set of the text around them, and no include guard.

// All functions with vectors are inlined: GCC warns that they have another ABI under each set.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#define ICEGRT_VECTOR_BYTES 16
namespace plain {
#ifndef ICEGRT_FOR_THIS_CPU
#include "lanes.hpp"
#endif
#include ICEGRT_TEXT
}  // namespace plain
#undef ICEGRT_VECTOR_BYTES

#if defined(__x86_64__) && !defined(__clang__) && __GNUC__ >= 12
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define ICEGRT_VECTOR_BYTES 32
namespace avx2 {
#ifndef ICEGRT_FOR_THIS_CPU
#include "lanes.hpp"
#endif
#include ICEGRT_TEXT
}  // namespace avx2
#undef ICEGRT_VECTOR_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define ICEGRT_VECTOR_BYTES 64
namespace avx512 {
#ifndef ICEGRT_FOR_THIS_CPU
#include "lanes.hpp"
#endif
#include ICEGRT_TEXT
}  // namespace avx512
#undef ICEGRT_VECTOR_BYTES
#pragma GCC pop_options
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#ifndef ICEGRT_FOR_THIS_CPU
#if defined(__x86_64__) && !defined(__clang__) && __GNUC__ >= 12
#define ICEGRT_FOR_THIS_CPU(...)                 \
  (instruction_set() == 2   ? avx512::__VA_ARGS__ \
   : instruction_set() == 1 ? avx2::__VA_ARGS__   \
                            : plain::__VA_ARGS__)
#else
#define ICEGRT_FOR_THIS_CPU(...) plain::__VA_ARGS__
#endif
#endif

#undef ICEGRT_TEXT
