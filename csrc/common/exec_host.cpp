#include "exec_host.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace vitzoo {
namespace host {

#ifdef __linux__

namespace {

// Fibers run straight-line kernel code; the address sanitizer pads every frame.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

// The stacks of a block's fibers, each below a page that may not be touched.
class Stacks {
 public:
  explicit Stacks(int count) : page_(size_t(sysconf(_SC_PAGESIZE))), bytes_((page_ + kStackBytes) * count) {
    memory_ =
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    for (int i = 0; i < count; ++i) mprotect(bottom(i) - page_, page_, PROT_NONE);
  }
  ~Stacks() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(memory_, bytes_);  // fibers never leave their first frame
#endif
    munmap(memory_, bytes_);
  }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  char* bottom(int i) const {
    return static_cast<char*>(memory_) + (page_ + kStackBytes) * size_t(i) + page_;
  }

 private:
  size_t page_, bytes_;
  void* memory_;
};

enum class State { ready, barrier, shuffle, finished };

struct Fiber {
  ucontext_t context;
  State state = State::finished;
  const char* file = "";
  int line = 0;
  void* fake_stack = nullptr;  // the address sanitizer's
};

struct Warp {
  float slots[2][kWarp];
  int arrived = 0;
  int phase = 0;
};

enum class Order { forward, reverse, shuffled };

Order order() {
  const char* name = std::getenv("VITZOO_CUDA_HOST_ORDER");
  const std::string value = name ? name : "forward";
  if (value == "forward") return Order::forward;
  if (value == "reverse") return Order::reverse;
  if (value == "shuffled") return Order::shuffled;
  throw std::runtime_error("VITZOO_CUDA_HOST_ORDER is '" + value + "', not forward, reverse or shuffled");
}

}  // namespace

class Block {
 public:
  Block(const Grid& grid, const std::function<void(HostExec&)>& body)
      : grid_(grid),
        body_(body),
        stacks_(grid.threads),
        fibers_(size_t(grid.threads)),
        warps_(size_t(grid.threads / kWarp)),
        turn_(size_t(grid.threads)),
        shared_(static_cast<char*>(::operator new(grid.shared_bytes, std::align_val_t(16)))) {
    std::iota(turn_.begin(), turn_.end(), 0);
    if (order() == Order::reverse) std::reverse(turn_.begin(), turn_.end());
    if (order() == Order::shuffled) std::shuffle(turn_.begin(), turn_.end(), std::mt19937(1));
  }

  void run(int64_t index);
  void barrier(int thread, const char* file, int line);
  float exchange(int thread, float value, int source, const char* file, int line);

  int threads() const { return grid_.threads; }
  int64_t index() const { return index_; }
  void* shared() { return shared_.get(); }

 private:
  struct Freed {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t(16)); }
  };

  static void enter();
  void start(int thread);
  void yield();
  void switch_to(Fiber& from, Fiber& to, const void* bottom, size_t bytes, bool last);
  void check() const;
  std::string place(int thread) const;

  Grid grid_;
  const std::function<void(HostExec&)>& body_;
  Stacks stacks_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<int> turn_;  // the threads in the order in which they run
  std::unique_ptr<char, Freed> shared_;
  Fiber scheduler_;
  const void* scheduler_bottom_ = nullptr;
  size_t scheduler_bytes_ = 0;
  int64_t index_ = 0;
  size_t position_ = 0;  // in turn_, of the thread that runs
  int at_barrier_ = 0;
  std::exception_ptr error_;
};

namespace {
thread_local Block* entering = nullptr;
}

// Switches fibers; `last` where `from` will never run again.
void Block::switch_to(Fiber& from, Fiber& to, const void* bottom, size_t bytes, bool last) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, bottom, bytes);
#else
  (void)bottom, (void)bytes, (void)last;
#endif
  swapcontext(&from.context, &to.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void Block::enter() {
  Block& block = *entering;
  const int thread = block.turn_[block.position_];
#if defined(__SANITIZE_ADDRESS__)
  // the first fiber comes from the scheduler, whose stack is learnt here
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (block.scheduler_bottom_ == nullptr) {
    block.scheduler_bottom_ = bottom;
    block.scheduler_bytes_ = bytes;
  }
#endif
  try {
    HostExec exec(block, thread);
    block.body_(exec);
  } catch (...) {
    if (!block.error_) block.error_ = std::current_exception();
  }
  block.fibers_[size_t(thread)].state = State::finished;
  block.yield();
}

void Block::start(int thread) {
  Fiber& fiber = fibers_[size_t(thread)];
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stacks_.bottom(thread),
                                kStackBytes);  // a fiber left midway poisons its frames
#endif
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stacks_.bottom(thread);
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &Block::enter, 0);
  fiber.state = State::ready;
}

// Lets the next ready thread run; the scheduler where there is none.
void Block::yield() {
  Fiber& self = fibers_[size_t(turn_[position_])];
  const bool last = self.state == State::finished;
  for (size_t step = 1; step <= turn_.size(); ++step) {
    const size_t next = (position_ + step) % turn_.size();
    Fiber& fiber = fibers_[size_t(turn_[next])];
    if (fiber.state != State::ready) continue;
    if (&fiber == &self) return;
    position_ = next;
    switch_to(self, fiber, stacks_.bottom(turn_[next]), kStackBytes, last);
    return;
  }
  switch_to(self, scheduler_, scheduler_bottom_, scheduler_bytes_, last);
}

void Block::run(int64_t index) {
  index_ = index;
  at_barrier_ = 0;
  error_ = nullptr;
  scheduler_bottom_ = nullptr;
  std::memset(shared_.get(), 0xff, grid_.shared_bytes);  // NaN in every floating-point type
  for (Warp& warp : warps_) {
    std::memset(warp.slots, 0xff, sizeof(warp.slots));
    warp.arrived = warp.phase = 0;
  }
  for (int thread = 0; thread < grid_.threads; ++thread) start(thread);
  position_ = 0;
  entering = this;
  switch_to(scheduler_, fibers_[size_t(turn_[0])], stacks_.bottom(turn_[0]), kStackBytes, false);
  // every fiber has finished, or none can go on
  if (error_) std::rethrow_exception(error_);
  check();
}

std::string Block::place(int thread) const {
  const Fiber& fiber = fibers_[size_t(thread)];
  const std::string who = "thread " + std::to_string(thread);
  if (fiber.state == State::finished) return who + " has left the kernel";
  const std::string path = fiber.file;
  return who + " waits at the " + (fiber.state == State::barrier ? "barrier" : "shuffle") + " of " +
         path.substr(path.find_last_of('/') + 1) + ":" + std::to_string(fiber.line);
}

void Block::check() const {
  const auto waiting = std::find_if(fibers_.begin(), fibers_.end(),
                                    [](const Fiber& fiber) { return fiber.state != State::finished; });
  if (waiting == fibers_.end()) return;
  const int first = int(waiting - fibers_.begin());
  for (int thread = 0; thread < grid_.threads; ++thread) {
    const Fiber& fiber = fibers_[size_t(thread)];
    if (fiber.state != waiting->state || fiber.line != waiting->line)
      throw std::runtime_error("the threads of block " + std::to_string(index_) +
                               " diverge: " + place(first) + ", " + place(thread));
  }
  throw std::runtime_error("the threads of block " + std::to_string(index_) +
                           " cannot go on: " + place(first));
}

void Block::barrier(int thread, const char* file, int line) {
  Fiber& self = fibers_[size_t(thread)];
  self.state = State::barrier;
  self.file = file;
  self.line = line;
  if (++at_barrier_ < grid_.threads) return yield();
  for (const Fiber& fiber : fibers_)
    if (fiber.line != line || std::strcmp(fiber.file, file) != 0) return yield();  // run() tells where
  at_barrier_ = 0;
  for (Fiber& fiber : fibers_) fiber.state = State::ready;
}

// The slots of a warp alternate between shuffles: a lane can be one shuffle ahead of another, not two.
float Block::exchange(int thread, float value, int source, const char* file, int line) {
  Warp& warp = warps_[size_t(thread / kWarp)];
  const int phase = warp.phase;
  warp.slots[phase][thread % kWarp] = value;
  Fiber& self = fibers_[size_t(thread)];
  self.state = State::shuffle;
  self.file = file;
  self.line = line;
  Fiber* lanes = &fibers_[size_t(thread / kWarp * kWarp)];
  if (++warp.arrived == kWarp &&
      std::all_of(lanes, lanes + kWarp, [&](const Fiber& fiber) { return fiber.line == line; })) {
    warp.arrived = 0;
    warp.phase = 1 - phase;
    for (int lane = 0; lane < kWarp; ++lane) lanes[lane].state = State::ready;
  } else {
    yield();
  }
  return warp.slots[phase][source];
}

#else

class Block {
 public:
  Block(const Grid&, const std::function<void(HostExec&)>&) {
    throw std::runtime_error("the host form of the CUDA kernels needs Linux");
  }
  void run(int64_t) {}
  void barrier(int, const char*, int) {}
  float exchange(int, float value, int, const char*, int) { return value; }
  int threads() const { return kWarp; }
  int64_t index() const { return 0; }
  void* shared() { return nullptr; }
};

#endif

}  // namespace host

int HostExec::threads() const { return block_.threads(); }
int64_t HostExec::block() const { return block_.index(); }
void* HostExec::shared() { return block_.shared(); }
void HostExec::barrier(const char* file, int line) { block_.barrier(thread_, file, line); }
float HostExec::exchange(float value, int source, const char* file, int line) {
  return block_.exchange(thread_, value, source, file, line);
}

void run_on_host(const Grid& grid, const std::function<void(HostExec&)>& body) {
  if (grid.threads <= 0 || grid.threads % kWarp != 0 || grid.threads > 1024)
    throw std::runtime_error("a block of " + std::to_string(grid.threads) + " threads is not of whole warps");
  // what is thrown would lose its message on the way through the C interface of parallel_for
  std::mutex mutex;
  std::exception_ptr error;
  torch::stable::parallel_for(0, grid.blocks, 1, [&](int64_t begin, int64_t end) {
    try {
      host::Block block(grid, body);
      for (int64_t i = begin; i < end; ++i) block.run(i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace vitzoo
