// vitzoo_native::attention_fwd and attention_bwd on the CPU, for pooled_attention and attention_with_scores.
// kernels/common/attention/cpu.py allocates every output; shapes are in attention_args.h.

#include <optional>

#include "attention_args.h"
#include "checks.h"
#include "isa.h"
#include "scratch.h"

namespace vitzoo {
namespace {

using Optional = std::optional<Tensor>;

constexpr int64_t kItems = 32;  // work items that the forward pass aims at

HeadsView heads_of(const Tensor& x, const char* name, const AttentionArgs& k, int64_t batch, int64_t tokens,
                   bool wide) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && x.size(0) == batch && x.size(1) == k.heads &&
                      x.size(2) == tokens && x.size(3) == k.head_dim,
                  name, " does not have the expected shape on the CPU");
  STD_TORCH_CHECK(k.head_dim == 1 || x.stride(3) == 1, name, " must be contiguous along head_dim");
  const Kind kind = kind_of(x, name);
  STD_TORCH_CHECK((kind == Kind::f64) == wide, name, " must be float64 exactly when q is");
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), kind};
}

void set_block(AttentionArgs& args, int64_t block) {
  STD_TORCH_CHECK(block > 0 && block <= 64 && block % 16 == 0, "block is not 16, 32, 48 or 64");
  args.block = block;
}

AttentionArgs inputs(const Tensor& q, const Tensor& k, const Tensor& v, double scale, int64_t block) {
  AttentionArgs args{};
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "q and k must be (B, heads, L, head_dim)");
  set_block(args, block);
  args.batch = q.size(0);
  args.heads = q.size(1);
  args.queries = q.size(2);
  args.head_dim = q.size(3);
  args.keys = k.size(2);
  args.scale = scale;
  STD_TORCH_CHECK(args.keys > 0, "there are no keys");
  const bool wide = q.scalar_type() == ScalarType::Double;
  args.q = heads_of(q, "q", args, args.batch, args.queries, wide);
  args.k = heads_of(k, "k", args, args.batch, args.keys, wide);
  args.v = heads_of(v, "v", args, args.batch, args.keys, wide);
  return args;
}

// Bytes a thread needs; the sizes of common/attention.h with the widest vectors.
size_t scratch_bytes(const AttentionArgs& k, bool backward) {
  const size_t keys = size_t(k.keys), d = size_t(k.head_dim), rows = keys * (d + 16) + 16;
  const size_t tables = keys + 4 * size_t(k.block) + 64;
  const size_t work =
      backward ? 4 * rows + (4 * (d + 16) + 2 * keys + 8) * 64 : 2 * rows + (2 * d + 100) * 64;
  return 8 * (tables + work);
}

void run_forward(AttentionArgs& args) {
  const int64_t pairs = args.batch * args.heads, blocks = (args.queries + args.block - 1) / args.block;
  const int64_t wanted = (kItems + pairs - 1) / pairs;
  args.parts = wanted < blocks ? wanted : blocks;
  const AttentionKernels& kernels = select(attention_baseline, attention_avx2, attention_avx512);
  run_items(args.q.kind == Kind::f64 ? kernels.forward_f64 : kernels.forward_f32, args, pairs * args.parts,
            scratch_bytes(args, false));
}

// The mean over heads of the weights of query 0, without that of key 0: (batch, keys - 1).
template <class T>
void average_first_rows(const AttentionArgs& args, T* scores) {
  const int64_t others = args.keys - 1;
  const T* row = static_cast<const T*>(args.first_rows) + 1;
  for (int64_t b = 0; b < args.batch; ++b, scores += others) {
    for (int64_t i = 0; i < others; ++i) {
      scores[i] = T(0);
    }
    for (int64_t h = 0; h < args.heads; ++h, row += args.keys) {
      for (int64_t i = 0; i < others; ++i) {
        scores[i] += row[i];
      }
    }
    for (int64_t i = 0; i < others; ++i) {
      scores[i] /= T(args.heads);
    }
  }
}

void attention_with_scores_fwd_cpu(Tensor q, Tensor k, Tensor v, double scale, int64_t block, Tensor out,
                                   Tensor first_rows, Tensor scores) {
  AttentionArgs args = inputs(q, k, v, scale, block);
  const bool wide = args.q.kind == Kind::f64;
  args.out = heads_of(out, "out", args, args.batch, args.queries, wide);
  args.first_rows = pointer_of(first_rows, "first_rows", args.batch * args.heads * args.keys, wide);
  void* const means = pointer_of(scores, "scores", args.batch * (args.keys - 1), wide);
  run_forward(args);
  if (wide) {
    average_first_rows(args, static_cast<double*>(means));
  } else {
    average_first_rows(args, static_cast<float*>(means));
  }
}

// The heads of a map (batch, height, width, groups * heads * head_dim), of its first group of channels.
HeadsView heads_of_map(const Tensor& x, const char* name, const AttentionArgs& k, int64_t tokens,
                       int64_t groups) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && x.size(0) == k.batch && x.size(1) * x.size(2) == tokens &&
                      x.size(3) == groups * k.heads * k.head_dim,
                  name, " is not a map of the expected shape on the CPU");
  const int64_t height = x.size(1), width = x.size(2);
  STD_TORCH_CHECK((x.size(3) == 1 || x.stride(3) == 1) &&
                      (height == 1 || width == 1 || x.stride(1) == width * x.stride(2)),
                  name, " must be contiguous along the channels and have its rows one after the other");
  return {x.data_ptr(), x.stride(0), k.head_dim, x.stride(width == 1 ? 1 : 2), kind_of(x, name)};
}

void pooled_attention_fwd_cpu(Tensor q, Tensor kv, int64_t heads, double scale, int64_t block, Tensor out) {
  AttentionArgs args{};
  STD_TORCH_CHECK(q.dim() == 4 && kv.dim() == 4 && heads > 0 && q.size(3) % heads == 0,
                  "q must be (B, H, W, heads * head_dim) and kv a map too");
  set_block(args, block);
  args.batch = q.size(0);
  args.heads = heads;
  args.head_dim = q.size(3) / heads;
  args.queries = q.size(1) * q.size(2);
  args.keys = kv.size(1) * kv.size(2);
  args.scale = scale;
  STD_TORCH_CHECK(args.keys > 0, "there are no keys");
  args.q = heads_of_map(q, "q", args, args.queries, 1);
  args.out = heads_of_map(out, "out", args, args.queries, 1);
  args.k = heads_of_map(kv, "kv", args, args.keys, 2);
  STD_TORCH_CHECK((args.k.kind == Kind::f64) == (args.q.kind == Kind::f64) && args.out.kind == args.q.kind,
                  "kv must be float64 exactly when q is, and out have the dtype of q");
  args.v = args.k;
  args.v.data = static_cast<char*>(args.k.data) + q.size(3) * int64_t(kv.element_size());
  run_forward(args);
}

void attention_bwd_cpu(Tensor dout, Optional dfirst_row, Tensor q, Tensor k, Tensor v, double scale,
                       int64_t block, int64_t parts, Tensor dq, Tensor dk, Tensor dv) {
  AttentionArgs args = inputs(q, k, v, scale, block);
  const bool wide = args.q.kind == Kind::f64;
  STD_TORCH_CHECK(parts > 0, "parts must be positive");
  args.parts = parts;
  args.dout = heads_of(dout, "dout", args, args.batch, args.queries, wide);
  args.dq = heads_of(dq, "dq", args, args.batch, args.queries, wide);
  args.dk = heads_of(dk, "dk", args, parts * args.batch, args.keys, wide);
  args.dv = heads_of(dv, "dv", args, parts * args.batch, args.keys, wide);
  args.dfirst_row = pointer_of(dfirst_row, "dfirst_row", args.batch * args.keys, wide);
  const AttentionKernels& kernels = select(attention_baseline, attention_avx2, attention_avx512);
  run_items(wide ? kernels.backward_f64 : kernels.backward_f32, args, args.batch * args.heads * parts,
            scratch_bytes(args, true));
}

}  // namespace
}  // namespace vitzoo

STABLE_TORCH_LIBRARY_FRAGMENT(vitzoo_native, m) {
  m.def(
      "attention_with_scores_fwd(Tensor q, Tensor k, Tensor v, float scale, int block, Tensor(a!) out, "
      "Tensor(b!) first_rows, Tensor(c!) scores) -> ()");
  m.def("pooled_attention_fwd(Tensor q, Tensor kv, int heads, float scale, int block, Tensor(a!) out) -> ()");
  m.def(
      "attention_bwd(Tensor dout, Tensor? dfirst_row, Tensor q, Tensor k, Tensor v, float scale, int block, "
      "int parts, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vitzoo_native, CPU, m) {
  m.impl("attention_with_scores_fwd", TORCH_BOX(&vitzoo::attention_with_scores_fwd_cpu));
  m.impl("pooled_attention_fwd", TORCH_BOX(&vitzoo::pooled_attention_fwd_cpu));
  m.impl("attention_bwd", TORCH_BOX(&vitzoo::attention_bwd_cpu));
}
