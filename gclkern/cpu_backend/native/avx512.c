/* The loops for x86 processors with AVX-512 (x86-64-v4). */
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,bmi,bmi2,prefer-vector-width=512")
#endif
#define GCLKERN_AVX512
#define GCLKERN_LOOPS avx512
#include "loops.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int no_loops; /* a file may not be empty */
#endif
