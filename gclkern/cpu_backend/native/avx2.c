/* The loops for x86 processors with AVX2 and FMA (x86-64-v3). */
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi,bmi2")
#endif
#define GCLKERN_AVX2
#define GCLKERN_LOOPS avx2
#include "loops.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int no_loops; /* a file may not be empty */
#endif
