#include "emulator.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace diveq::emulator {
namespace {

constexpr size_t kStack = 256 << 10, kGuard = 4096;
constexpr int kMaxThreads = 1024;

// ---- fibers ---------------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
using Context = void*;  // the stack pointer; what a call must preserve lies on the stack

extern "C" void diveq_switch_context(Context* from, Context to);
asm(R"(
.text
.hidden diveq_switch_context
.type diveq_switch_context, @function
diveq_switch_context:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size diveq_switch_context, .-diveq_switch_context
)");

void switch_context(Context& from, Context& to) { diveq_switch_context(&from, to); }

Context new_context(char* stack, size_t size, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(stack + size);
  *--top = nullptr;  // where `entry` would return to: aligns its frame
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  return top;
}
#else
using Context = ucontext_t;

void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

Context new_context(char* stack, size_t size, void (*entry)()) {
  Context context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = size;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
  return context;
}
#endif

enum class State { ready, at_barrier, in_exchange, done };

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Thread {
  char* stack = nullptr;
  Context context;
  State state;
  dim3 index;
  Place place;
  int value;  // what it brings to a barrier
  int parity;  // of the warp's next exchange
  std::vector<Copy> copies;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
};

struct Warp {
  uint32_t words[2][32][kExchange];
};

struct Block {
  Thread threads[kMaxThreads];
  Warp warps[kMaxThreads / 32];
  int count = 0;  // of threads
  int barrier_total = 0;
  Context scheduler;
  Thread* running = nullptr;
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
  std::unique_ptr<char[]> shared;
  size_t shared_bytes = 0, array_bytes = 0;  // of the launch, and in arrays of fixed size
  bool misaligned = false;  // whether a copy was
  int64_t number = 0;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  const void* stack = nullptr;
  size_t stack_size = 0;
#endif
};

Block& block() {
  static auto* const only = new Block;  // for as long as the process lives
  return *only;
}

std::mutex mutex;  // autograd launches from threads of its own
int64_t launches = 0, barriers = 0;  // so far; that the last launch's blocks came to
int64_t schedule = 0;  // 0: threads in order, 1: in reverse, else shuffled by this seed
std::mt19937_64 random_bits;
std::string running;

// From the running fiber back to the scheduler.
void yield(State state) {
  Block& b = block();
  Thread& t = *b.running;
  t.state = state;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(state == State::done ? nullptr : &t.fake_stack, b.stack, b.stack_size);
#endif
  switch_context(t.context, b.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(t.fake_stack, &b.stack, &b.stack_size);
#endif
}

void entry() {
  Block& b = block();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &b.stack, &b.stack_size);
#endif
  b.body(b.arguments);
  yield(State::done);
  abort();  // a fiber that is done is not resumed
}

void resume(Thread& t) {
  Block& b = block();
  b.running = &t;
  threadIdx = t.index;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&b.fake_stack, t.stack, kStack);
#endif
  switch_context(b.scheduler, t.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(b.fake_stack, nullptr, nullptr);
#endif
  b.running = nullptr;
}

void start(Thread& t) {
  if (!t.stack) {
    void* memory = mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE)) throw std::runtime_error("no memory for a fiber");
    t.stack = static_cast<char*>(memory) + kGuard;
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(t.stack, kStack);  // left by a fiber that was never finished
#endif
  t.context = new_context(t.stack, kStack, entry);
  t.state = State::ready;
  t.parity = 0;
  t.copies.clear();
}

// ---- a block --------------------------------------------------------------------------------------------------------

std::string describe(const Thread& t) {
  static const char* const kStates[] = {"is ready", "waits at the barrier", "waits for its warp", "is done"};
  std::string text = "thread " + std::to_string(&t - block().threads) + " " + kStates[(int)t.state];
  if (t.state != State::done) text += std::string(" in ") + t.place.file + ":" + std::to_string(t.place.line);
  return text;
}

[[noreturn]] void fail(const std::string& what) {
  throw std::runtime_error("emulated kernel " + running + ", block (" + std::to_string(blockIdx.x) + ", " +
                           std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + "): " + what);
}

// Whether threads first .. last - 1 all wait in this state; if so they may go on.
bool release(int first, int last, State state) {
  Block& b = block();
  for (int i = first; i < last; ++i)
    if (b.threads[i].state != state) return false;
  for (int i = first; i < last; ++i) {
    const Place &place = b.threads[i].place, &other = b.threads[first].place;
    if (place.line != other.line || strcmp(place.file, other.file))
      fail("different places: " + describe(b.threads[first]) + ", " + describe(b.threads[i]));
  }
  for (int i = first; i < last; ++i) b.threads[i].state = State::ready;
  return true;
}

void shuffle_order(std::vector<int>& order) {
  for (size_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[random_bits() % (i + 1)]);
}

// Numbers below `count` as the schedule has them.
std::vector<int> in_order(int count) {
  std::vector<int> order(count);
  for (int i = 0; i < count; ++i) order[i] = schedule == 1 ? count - 1 - i : i;
  if (schedule > 1) shuffle_order(order);
  return order;
}

// Lets a warp's lanes run until each waits, and then whether its exchange lets them go on.
bool run_warp(int first, const std::vector<int>& lanes) {
  Block& b = block();
  for (int l : lanes)
    if (b.threads[first + l].state == State::ready) resume(b.threads[first + l]);
  return release(first, first + 32, State::in_exchange);
}

void run_block() {
  Block& b = block();
  b.misaligned = false;
  std::vector<int> warps = in_order(b.count / 32), lanes = in_order(32);
  for (int i = 0; i < b.count; ++i) start(b.threads[i]);
  for (;;) {
    bool moved = false;
    if (schedule > 1) {  // the warps in turns
      shuffle_order(warps);
      shuffle_order(lanes);
      for (int w : warps) moved |= run_warp(32 * w, lanes);
    } else {  // each as far as it gets
      for (int w : warps)
        while (run_warp(32 * w, lanes)) moved = true;
    }
    int done = 0;
    for (int i = 0; i < b.count; ++i) done += b.threads[i].state == State::done;
    if (done == b.count) break;
    if (b.threads[0].state == State::at_barrier) {
      int total = 0;
      for (int i = 0; i < b.count; ++i) total += b.threads[i].value;
      if (release(0, b.count, State::at_barrier)) {
        b.barrier_total = total;
        ++barriers;
        moved = true;
      }
    }
    if (!moved) {
      std::string what = "these will wait for ever:";
      int told = 0, first = -1;
      for (int i = 0; i < b.count && told < 8; ++i) {
        if (first >= 0 && b.threads[i].state == b.threads[first].state && b.threads[i].place.line == b.threads[first].place.line)
          continue;
        what += std::string(told++ ? "; " : " ") + describe(b.threads[i]);
        first = i;
      }
      fail(what);
    }
  }
  if (b.shared_bytes + b.array_bytes > kMaxShared)
    fail("no GPU has " + std::to_string(b.shared_bytes + b.array_bytes) + " bytes of shared memory for a block, " +
         std::to_string(b.array_bytes) + " of them in arrays of fixed size");
  if (b.misaligned) fail("an asynchronous copy is not aligned to its size");
  for (int i = 0; i < b.count; ++i)
    if (!b.threads[i].copies.empty()) fail("thread " + std::to_string(i) + " ends without waiting for its copies");
}

}  // namespace

int barrier_sum(Place place, int value) {
  Block& b = block();
  b.running->place = place;
  b.running->value = value;
  yield(State::at_barrier);
  return b.barrier_total;
}

void barrier(Place place) { barrier_sum(place, 0); }

const uint32_t (*exchange(Place place, unsigned mask, const uint32_t* words, int count))[kExchange] {
  Block& b = block();
  Thread& t = *b.running;
  const auto number = static_cast<int>(&t - b.threads);
  t.place = place;
  if (mask != 0xFFFFFFFFu) {
    fprintf(stderr, "%s:%d: only whole warps are emulated\n", place.file, place.line);
    abort();
  }
  auto* shown = b.warps[number / 32].words[t.parity];
  t.parity ^= 1;
  if (count) memcpy(shown[number % 32], words, count * sizeof *words);
  yield(State::in_exchange);
  return shown;
}

void* shared_memory() { return block().shared.get(); }

void poison(void* memory, size_t bytes, int64_t& number) {
  if (number == block().number) return;
  number = block().number;
  block().array_bytes += bytes;
  memset(memory, 0xFF, bytes);
}

void copy_async(void* to, const void* from, int bytes) {
  block().misaligned |= (reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes != 0;
  const bool at_once = schedule == 1 || (schedule > 1 && random_bits() % 2);
  if (at_once) memcpy(to, from, bytes);
  block().running->copies.push_back({to, from, at_once ? 0 : bytes});  // to be waited for all the same
}

void finish_copies() {
  Thread& t = *block().running;
  for (const Copy& copy : t.copies) memcpy(copy.to, copy.from, copy.bytes);
  t.copies.clear();
}

void run(const char* name, dim3 grid, dim3 block_size, size_t shared_bytes, void (*body)(void*), void* arguments) {
  const std::lock_guard<std::mutex> lock(mutex);
  running = name;
  const char* forced = getenv("DIVEQ_EMULATED_SCHEDULE");
  schedule = forced ? atoll(forced) : launches % 3 < 2 ? launches % 3 : launches;
  ++launches;
  barriers = 0;
  const auto total = (uint64_t)block_size.x * block_size.y * block_size.z;
  if (!total || total > kMaxThreads || total % 32 || !grid.x || grid.x > 0x7FFFFFFFu || !grid.y || grid.y > 65535 ||
      !grid.z || grid.z > 65535 || shared_bytes > kMaxShared)
    throw std::runtime_error("emulated kernel " + running + ": no GPU takes a grid of (" + std::to_string(grid.x) +
                             ", " + std::to_string(grid.y) + ", " + std::to_string(grid.z) + ") blocks of " +
                             std::to_string(total) + " threads and " + std::to_string(shared_bytes) +
                             " bytes of shared memory (and blocks must be whole warps here)");
  Block& b = block();
  b.count = static_cast<int>(total);
  b.body = body;
  b.arguments = arguments;
  blockDim = block_size;
  gridDim = grid;
  for (int i = 0; i < b.count; ++i) {
    const unsigned x = i % block_size.x, rest = i / block_size.x;
    b.threads[i].index = dim3(x, rest % block_size.y, rest / block_size.y);
  }
  random_bits.seed(schedule);
  b.shared_bytes = shared_bytes;
  b.shared.reset(new char[shared_bytes]);  // of just this size, for AddressSanitizer
  const auto blocks = (uint64_t)grid.x * grid.y * grid.z;
  if (blocks > 0x7FFFFFFFu) throw std::runtime_error("emulated kernel " + running + ": too many blocks to emulate");
  for (const int i : in_order((int)blocks)) {
    blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    ++b.number;
    b.array_bytes = 0;
    memset(b.shared.get(), 0xFF, shared_bytes);
    run_block();
  }
  if (const char* path = getenv("DIVEQ_EMULATED_LAUNCHES")) {
    if (FILE* file = fopen(path, "a")) fprintf(file, "%s %lld\n", name, static_cast<long long>(barriers)), fclose(file);
  }
}

}  // namespace diveq::emulator
