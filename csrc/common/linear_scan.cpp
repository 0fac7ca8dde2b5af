// vitzoo_native::linear_scan_fwd and linear_scan_bwd on the CPU. kernels/common/linear_scan_cpu.py allocates
// every output and says how the work is cut, by the shape alone: the result does not depend on the number of
// threads.

#include "linear_scan.h"

#include <memory>
#include <new>
#include <optional>

#include "checks.h"
#include "isa.h"

namespace vitzoo {
namespace {

using Optional = std::optional<Tensor>;

constexpr int64_t kFewChunks = 4;  // of which the backward pass holds every state

struct Freed {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};
using Memory = std::unique_ptr<void, Freed>;

Memory allocate(size_t bytes) { return Memory(::operator new(bytes, std::align_val_t(64))); }

View rows_of(const Tensor& x, const char* name, int64_t batch, int64_t seqlen, int64_t heads, int64_t width,
             bool wide) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && x.size(0) == batch && x.size(1) == seqlen &&
                      x.size(2) == heads && x.size(3) == width,
                  name, " is not a (", batch, ", ", seqlen, ", ", heads, ", ", width, ") tensor on the CPU");
  STD_TORCH_CHECK(width == 1 || x.stride(3) == 1, name, " is not contiguous along its last dimension");
  View view;
  view.kind = kind_of(x, name);
  STD_TORCH_CHECK((view.kind == Kind::f64) == wide, name, " must be float64 exactly when v is");
  view.data = x.data_ptr();
  view.batch = x.stride(0);
  view.token = x.stride(1);
  view.channel = x.stride(2);
  return view;
}

struct Call {
  LinearScanArgs k{};
  const LinearScanSet* set;
  size_t element, scratch_bytes;
  int64_t items, block;

  size_t state_bytes() const { return size_t(k.batch * k.heads * state_size(k)) * element; }
  size_t decay_bytes() const { return size_t(k.batch * k.heads) * element; }

  // Runs a step for chunks [first, first + count) of every item. Their gradients lie in slots from 0 on,
  // their states in slots from `state_slot` on.
  void run(LinearScanStep step, int64_t first, int64_t count, int64_t state_slot = 0) const {
    torch::stable::parallel_for(0, items * count, 1, [&](int64_t begin, int64_t end) {
      const Memory scratch = allocate(scratch_bytes);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t slot = i % count;
        step(k, {i / count, first + slot, state_slot + slot, slot}, scratch.get());
      }
    });
  }

  void pass(int64_t count, bool reverse, void* carry) const {
    torch::stable::parallel_for(0, k.batch * k.heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) {
        set->pass_states(k, head, count, reverse, carry);
      }
    });
  }
};

Call call_of(const Tensor& q, const Tensor& key, const Tensor& v, const Optional& dt, const Tensor& rate,
             const Optional& dt_bias, bool dt_softplus, const Optional& d, const Optional& z,
             bool has_initial, double scale, int64_t part_heads, int64_t block) {
  Call call;
  LinearScanArgs& k = call.k;
  STD_TORCH_CHECK(v.dim() == 4 && q.dim() == 4, "q and v must have four dimensions");
  k.batch = v.size(0);
  k.seqlen = v.size(1);
  k.heads = v.size(2);
  k.dv = v.size(3);
  k.groups = q.size(2);
  k.dk = q.size(3);
  STD_TORCH_CHECK(k.groups > 0 && k.heads % k.groups == 0 && part_heads > 0 && block > 0 && k.seqlen > 0,
                  "groups do not divide the heads, or a size is not positive");
  const bool wide = v.scalar_type() == ScalarType::Double;
  k.chunks = (k.seqlen + kChunk - 1) / kChunk;
  k.part_heads = part_heads;
  k.parts = (k.heads / k.groups + part_heads - 1) / part_heads;
  k.scale = scale;
  k.dt_softplus = dt_softplus;
  k.has_initial = has_initial;
  k.q = rows_of(q, "q", k.batch, k.seqlen, k.groups, k.dk, wide);
  k.k = rows_of(key, "k", k.batch, k.seqlen, k.groups, k.dk, wide);
  k.v = rows_of(v, "v", k.batch, k.seqlen, k.heads, k.dv, wide);
  if (z.has_value()) {
    k.z = rows_of(*z, "z", k.batch, k.seqlen, k.heads, k.dv, wide);
  }
  if (dt.has_value()) {
    STD_TORCH_CHECK(dt->is_cpu() && dt->dim() == 3 && dt->size(0) == k.batch && dt->size(1) == k.seqlen &&
                        dt->size(2) == k.heads,
                    "dt is not a (B, L, heads) tensor on the CPU");
    k.dt.kind = kind_of(*dt, "dt");
    STD_TORCH_CHECK((k.dt.kind == Kind::f64) == wide, "dt must be float64 exactly when v is");
    k.dt.data = dt->data_ptr();
    k.dt.batch = dt->stride(0);
    k.dt.token = dt->stride(1);
    k.dt.channel = dt->stride(2);
  }
  k.rate = static_cast<const double*>(pointer_of(rate, "rate", k.heads, true));
  k.dt_bias = pointer_of(dt_bias, "dt_bias", k.heads, wide);
  k.d_by_channel = d.has_value() && d->dim() == 2;
  k.d = pointer_of(d, "D", k.d_by_channel ? k.heads * k.dv : k.heads, wide);
  const LinearScanKernels& kernels = select(linear_scan_baseline, linear_scan_avx2, linear_scan_avx512);
  call.set = wide ? &kernels.f64 : &kernels.f32;
  call.element = wide ? 8 : 4;
  call.scratch_bytes = linear_scan_scratch(k.dk, k.dv) * call.element;
  call.items = k.batch * k.groups * k.parts;
  call.block = block;
  return call;
}

void linear_scan_fwd_cpu(Tensor q, Tensor key, Tensor v, Optional dt, Tensor rate, Optional dt_bias,
                         bool dt_softplus, Optional d, Optional z, bool has_initial, double scale,
                         int64_t part_heads, int64_t block, Tensor out, Tensor state) {
  Call call = call_of(q, key, v, dt, rate, dt_bias, dt_softplus, d, z, has_initial, scale, part_heads, block);
  LinearScanArgs& k = call.k;
  const bool wide = call.element == 8;
  k.out = rows_of(out, "out", k.batch, k.seqlen, k.heads, k.dv, wide);
  void* const carry = pointer_of(state, "state", k.batch * k.heads * state_size(k), wide);
  if (block == 1) {  // enough items: each walks its chunks, the state stays near
    k.states = carry;
    torch::stable::parallel_for(0, call.items, 1, [&](int64_t begin, int64_t end) {
      const Memory scratch = allocate(call.scratch_bytes);
      for (int64_t item = begin; item < end; ++item) {
        for (int64_t chunk = 0; chunk < k.chunks; ++chunk) {
          call.set->output(k, {item, chunk, 0, 0}, scratch.get());
          call.set->next_state(k, {item, chunk, 0, 0}, scratch.get());
        }
      }
    });
    return;
  }
  const Memory states = allocate(size_t(block) * call.state_bytes());
  const Memory decays = allocate(size_t(block) * call.decay_bytes());
  k.states = states.get();
  k.state_decays = decays.get();
  for (int64_t first = 0; first < k.chunks; first += block) {
    const int64_t count = k.chunks - first < block ? k.chunks - first : block;
    call.run(call.set->add_state, first, count);
    call.pass(count, false, carry);
    call.run(call.set->output, first, count);
  }
}

// The states that the backward pass needs are formed anew, window by window, from those that a first sweep
// left at the windows' starts: all of them would take as much memory as v where dk is kChunk.
int64_t window_of(int64_t chunks, int64_t block) {
  int64_t window = 1;
  while (window * window < chunks) {
    ++window;
  }
  window = window < kFewChunks ? kFewChunks : window;
  return (window + block - 1) / block * block;
}

void backward_by_items(const Call& call, int64_t first, int64_t count) {
  const LinearScanArgs& k = call.k;
  torch::stable::parallel_for(0, call.items, 1, [&](int64_t begin, int64_t end) {
    const Memory scratch = allocate(call.scratch_bytes);
    for (int64_t item = begin; item < end; ++item) {
      for (int64_t slot = count - 1; slot >= 0; --slot) {
        call.set->backward(k, {item, first + slot, slot, 0}, scratch.get());
        call.set->next_gradient(k, {item, first + slot, slot, 0}, scratch.get());
      }
    }
  });
}

// Sums over the parts of a group what the work items of a block left in (batch, parts, span, width), into
// rows [first, first + count) of (batch, seqlen, width).
template <class T>
void sum_parts(const LinearScanArgs& k, int64_t count, const void* from, void* to) {
  const int64_t width = k.groups * k.dk;
  torch::stable::parallel_for(0, k.batch * count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / count, t = row % count;
      const T* const parts = static_cast<const T*>(from) + (b * k.parts * k.span + t) * width;
      T* const out = static_cast<T*>(to) + (b * k.seqlen + k.first + t) * width;
      for (int64_t i = 0; i < width; ++i) {
        T sum = parts[i];
        for (int64_t part = 1; part < k.parts; ++part) {
          sum += parts[part * k.span * width + i];
        }
        out[i] = sum;
      }
    }
  });
}

void linear_scan_bwd_cpu(Tensor dout, Tensor q, Tensor key, Tensor v, Optional dt, Tensor rate,
                         Optional dt_bias, bool dt_softplus, Optional d, Optional z, bool has_initial,
                         double scale, int64_t part_heads, int64_t block, Tensor state, Tensor dstate,
                         Tensor dq, Tensor dk, Tensor dv, Optional ddt, Tensor drate, Optional dd,
                         Optional dz) {
  Call call = call_of(q, key, v, dt, rate, dt_bias, dt_softplus, d, z, has_initial, scale, part_heads, block);
  LinearScanArgs& k = call.k;
  const bool wide = call.element == 8;
  const int64_t carried = k.batch * k.heads * state_size(k);
  const int64_t per_group = k.batch * k.seqlen * k.groups * k.dk;
  const int64_t per_chunk = k.batch * k.chunks * k.heads;
  k.dout = rows_of(dout, "dout", k.batch, k.seqlen, k.heads, k.dv, wide);
  k.dv_out = rows_of(dv, "dv", k.batch, k.seqlen, k.heads, k.dv, wide);
  STD_TORCH_CHECK(z.has_value() == dz.has_value(), "dz is wanted exactly when z is given");
  if (dz.has_value()) {
    k.dz = rows_of(*dz, "dz", k.batch, k.seqlen, k.heads, k.dv, wide);
  }
  void* const dq_out = pointer_of(dq, "dq", per_group, wide);
  void* const dk_out = pointer_of(dk, "dk", per_group, wide);
  k.ddt = pointer_of(ddt, "ddt", k.batch * k.seqlen * k.heads, wide);
  k.drate = pointer_of(drate, "drate", per_chunk, wide);
  k.dd = pointer_of(dd, "dD", per_chunk * k.dv, wide);
  void* const carry = pointer_of(state, "state", carried, wide);
  void* const gradient = pointer_of(dstate, "dstate", carried, wide);

  const int64_t window = window_of(k.chunks, block), windows = (k.chunks + window - 1) / window;
  const int64_t held = window < k.chunks ? window : k.chunks;
  const Memory states = allocate(size_t(held) * call.state_bytes());
  const Memory decays = allocate(size_t(held) * call.decay_bytes());
  const Memory starts = allocate(size_t(windows) * call.state_bytes());
  k.states = states.get();
  k.state_decays = decays.get();
  const auto start_of = [&](int64_t number) {
    return static_cast<char*>(starts.get()) + size_t(number) * call.state_bytes();
  };
  const auto form_states = [&](int64_t number) {
    const int64_t first = number * window, rest = k.chunks - first, count = rest < window ? rest : window;
    call.run(call.set->add_state, first, count);
    call.pass(count, false, carry);
    return count;
  };
  for (int64_t number = 0; number < windows; ++number) {
    __builtin_memcpy(start_of(number), carry, call.state_bytes());
    if (number + 1 < windows) {
      form_states(number);
    }
  }

  // Items of whole groups leave no partial sums; where they are many, each walks its chunks by itself.
  const bool by_items = block == 1 && k.parts == 1;
  k.span = k.parts == 1 ? k.seqlen : block * kChunk;
  const size_t partial_bytes = size_t(k.batch * k.parts * k.span * k.groups * k.dk) * call.element;
  const Memory dq_parts = k.parts == 1 ? nullptr : allocate(partial_bytes);
  const Memory dk_parts = k.parts == 1 ? nullptr : allocate(partial_bytes);
  k.dq = k.parts == 1 ? dq_out : dq_parts.get();
  k.dk_out = k.parts == 1 ? dk_out : dk_parts.get();
  const Memory gradients = by_items ? nullptr : allocate(size_t(block) * call.state_bytes());
  const Memory gradient_decays = by_items ? nullptr : allocate(size_t(block) * call.decay_bytes());
  k.gradients = by_items ? gradient : gradients.get();
  k.gradient_decays = gradient_decays.get();
  for (int64_t number = windows - 1; number >= 0; --number) {
    __builtin_memcpy(carry, start_of(number), call.state_bytes());
    const int64_t begin = number * window, count = form_states(number);
    if (by_items) {
      backward_by_items(call, begin, count);
      continue;
    }
    for (int64_t last = count; last > 0; last = (last - 1) / block * block) {
      const int64_t slot = (last - 1) / block * block;
      k.first = k.parts == 1 ? 0 : (begin + slot) * kChunk;
      call.run(call.set->add_gradient, begin + slot, last - slot, 0);
      call.pass(last - slot, true, gradient);
      call.run(call.set->backward, begin + slot, last - slot, slot);
      if (k.parts > 1) {
        const int64_t end = (begin + last) * kChunk, tokens = (end < k.seqlen ? end : k.seqlen) - k.first;
        const auto sum = wide ? sum_parts<double> : sum_parts<float>;
        sum(k, tokens, k.dq, dq_out);
        sum(k, tokens, k.dk_out, dk_out);
      }
    }
  }
}

}  // namespace
}  // namespace vitzoo

STABLE_TORCH_LIBRARY_FRAGMENT(vitzoo_native, m) {
  m.def(
      "linear_scan_fwd(Tensor q, Tensor k, Tensor v, Tensor? dt, Tensor rate, Tensor? dt_bias, bool "
      "dt_softplus, "
      "Tensor? D, Tensor? z, bool has_initial, float scale, int part_heads, int block, Tensor(a!) out, "
      "Tensor(b!) state) -> ()");
  m.def(
      "linear_scan_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? dt, Tensor rate, Tensor? dt_bias, "
      "bool dt_softplus, Tensor? D, Tensor? z, bool has_initial, float scale, int part_heads, int block, "
      "Tensor(a!) state, Tensor(b!) dstate, Tensor(c!) dq, Tensor(d!) dk, Tensor(e!) dv, Tensor(f!)? ddt, "
      "Tensor(g!) drate, Tensor(h!)? dD, Tensor(i!)? dz) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vitzoo_native, CPU, m) {
  m.impl("linear_scan_fwd", TORCH_BOX(&vitzoo::linear_scan_fwd_cpu));
  m.impl("linear_scan_bwd", TORCH_BOX(&vitzoo::linear_scan_bwd_cpu));
}
