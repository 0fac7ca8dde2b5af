// Compiles what follows, up to isa_end.h, for AVX2 with FMA and AVX-VNNI; see isa_avx2.h.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif
#define VITZOO_VECTOR_BYTES 32
#define VITZOO_VNNI
#endif
