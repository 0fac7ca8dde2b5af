// Compiles what follows, up to isa_end.h, for AVX2 with FMA; on other architectures, for their baseline. No
// standard header may be included in between: an inline function of the library compiled here could be the
// copy that the linker keeps for every CPU.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define VITZOO_VECTOR_BYTES 32
#endif
