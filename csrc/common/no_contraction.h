// From here to the end of the file a product and a sum are rounded one after the other, never fused: the same
// bits on CPUs with and without fused operations. Include after an isa_*.h header and before simd.h.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif
