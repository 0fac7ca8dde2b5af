// Compiles what follows, up to isa_end.h, for AVX-512 (F, DQ, BW, VL) with its VNNI; see isa_avx2.h.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,avx512vnni"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,avx512vnni")
#endif
#define VITZOO_VECTOR_BYTES 64
#define VITZOO_VNNI
#endif
