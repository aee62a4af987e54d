// Runs kernels on the CPU: each thread is a fiber, and blocks run one after the other, in random order.
//
// Threads go on in random order, from one point where they wait for others to the next, those of a warp too; in some
// blocks one runs ahead as far as it can. Where a GPU would hang or do anything at all, the launch throws.
//
// This file is compiled without sanitizers, and tells them what it does. The thread sanitizer takes fibers for threads
// that barriers order. A block runs on one of two sets of fibers, by chance, and nothing orders the sets before the grid
// ends: so it sees races between blocks, too.
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.h"

namespace emulation {
namespace {

enum State { kReady, kWaitsForBlock, kWaitsForLanes, kEnded };

void run_threads();

// Runs a thread of one block after the other.
struct Thread {
  Fiber fiber{run_threads};
  unsigned index;
  State state;
  Place place;
  unsigned mask;
  uint64_t value;
  std::array<uint64_t, 32> values;
  unsigned num_meetings = 0;  // of which this was the first lane
  char meeting[2];
};

struct Block {
  dim3 index, grid, size;
  size_t shared_bytes;
  const std::function<void()>* kernel;
  std::vector<std::unique_ptr<Thread>>& threads;
  std::vector<Thread*> ready;
  Thread* current = nullptr;
  unsigned num_at_barrier = 0, num_barriers = 0, num_ended = 0;
  char barrier[2];  // of which each is one, so that a thread does not acquire what another releases at the next
  bool runs_ahead;
  std::map<const void*, std::unique_ptr<char[]>> shared;
  std::string error;
};

std::mt19937 random_bits;
std::unique_ptr<Block> block;
Fiber* scheduler;
std::vector<std::unique_ptr<Thread>> threads[2];
char begin_of_grid, end_of_grid;

void pause() { block->current->fiber.switch_to(*scheduler); }

void run_threads() {
  for (;;) {
    acquire(&begin_of_grid);
    (*block->kernel)();
    release(&end_of_grid);
    block->current->state = kEnded;
    ++block->num_ended;
    pause();
  }
}

void make_ready(Thread& thread) {
  thread.state = kReady;
  block->ready.push_back(&thread);
}

std::string describe(Place place) { return std::string(place.file) + ":" + std::to_string(place.line); }

std::string deadlock() {
  std::map<std::string, int> waiting;
  for (unsigned i = 0; i < block->size.x; ++i) {
    const Thread& thread = *block->threads[i];
    if (thread.state != kEnded)
      ++waiting[(thread.state == kWaitsForBlock ? "for the block at " : "for lanes at ") + describe(thread.place)];
  }
  std::string text = "threads wait for others that do not come: " + std::to_string(block->num_ended) + " have ended";
  for (const auto& [where, count] : waiting) text += ", " + std::to_string(count) + " wait " + where;
  return text;
}

void run_block() {
  const unsigned num_threads = block->size.x;
  while (block->threads.size() < num_threads) block->threads.push_back(std::make_unique<Thread>());
  for (unsigned i = 0; i < num_threads; ++i) {
    block->threads[i]->index = i;
    make_ready(*block->threads[i]);
  }
  while (!block->ready.empty() && block->error.empty()) {
    std::vector<Thread*>& ready = block->ready;
    if (!block->runs_ahead || random_bits() % 64 == 0) std::swap(ready[random_bits() % ready.size()], ready.back());
    block->current = ready.back();
    ready.pop_back();
    scheduler->switch_to(block->current->fiber);
  }
  if (block->error.empty() && block->num_ended < num_threads) block->error = deadlock();
}

}  // namespace

dim3 thread_index() { return dim3(block->current->index, 0, 0); }
dim3 block_index() { return block->index; }
dim3 block_size() { return block->size; }
dim3 grid_size() { return block->grid; }

void* static_shared_memory(const void* site, size_t bytes) {
  const NewMemory scope;
  std::unique_ptr<char[]>& memory = block->shared[site];
  if (!memory) {
    memory.reset(new char[bytes]);
    std::memset(memory.get(), int(random_bits()), bytes);
  }
  return memory.get();
}

void* dynamic_shared_memory() { return static_shared_memory(nullptr, block->shared_bytes); }

void wait_for_block(Place place) {
  Thread& thread = *block->current;
  char* const barrier = &block->barrier[block->num_barriers % 2];
  release(barrier);
  thread.state = kWaitsForBlock;
  thread.place = place;
  if (++block->num_at_barrier == block->size.x) {
    block->num_at_barrier = 0;
    ++block->num_barriers;
    for (unsigned i = 0; i < block->size.x; ++i) {
      Thread& other = *block->threads[i];
      if (other.place != place) fail("a barrier, where other threads wait at " + describe(other.place), place);
      make_ready(other);
    }
  }
  pause();
  acquire(barrier);
}

std::array<uint64_t, 32> wait_for_lanes(unsigned mask, uint64_t value, bool orders_memory, Place place) {
  Thread& thread = *block->current;
  const unsigned first = thread.index / 32 * 32, size = std::min(32u, block->size.x - first);
  if (!(mask >> (thread.index - first) & 1)) fail("a lane outside its own mask", place);
  if (size < 32 && mask >> size) fail("a mask with lanes beyond the block", place);
  const auto lanes = block->threads.begin() + first;
  Thread& first_lane = *lanes[__builtin_ctz(mask)];
  char* const meeting = &first_lane.meeting[first_lane.num_meetings % 2];
  if (orders_memory) release(meeting);
  thread.state = kWaitsForLanes;
  thread.place = place;
  thread.mask = mask;
  thread.value = value;
  bool complete = true;
  std::array<uint64_t, 32> values{};
  for (unsigned i = 0; i < size && complete; ++i) {
    if (!(mask >> i & 1)) continue;
    complete = lanes[i]->state == kWaitsForLanes && lanes[i]->place == place && lanes[i]->mask == mask;
    values[i] = lanes[i]->value;
  }
  for (unsigned i = 0; i < size && complete; ++i) {
    if (!(mask >> i & 1)) continue;
    lanes[i]->values = values;
    make_ready(*lanes[i]);
  }
  if (complete) ++first_lane.num_meetings;
  pause();
  if (orders_memory) acquire(meeting);
  return thread.values;
}

void maybe_pause() {
  if (random_bits() % 4 != 0) return;
  make_ready(*block->current);
  pause();
}

void fail(const std::string& problem, Place place) {
  block->error = problem + ", at " + describe(place);
  for (;;) pause();
}

void run(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& kernel) {
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || grid.z != 1 || size.x == 0 || size.x > 1024 || size.y != 1 ||
      size.z != 1 || shared_bytes > 48 << 10)
    throw std::runtime_error("CUDA emulation: no such launch");
  Fiber caller;
  scheduler = &caller;
  std::vector<unsigned> order(size_t(grid.x) * grid.y);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random_bits);
  std::string error;
  release(&begin_of_grid);
  for (size_t i = 0; i < order.size() && error.empty(); ++i) {
    const dim3 index(order[i] % grid.x, order[i] / grid.x, 0);
    block.reset(new Block{.index = index, .grid = grid, .size = size, .shared_bytes = shared_bytes, .kernel = &kernel,
                          .threads = threads[random_bits() % 2], .runs_ahead = random_bits() % 2 == 0});
    run_block();
    error = block->error;
    const NewMemory scope;
    block.reset();
  }
  acquire(&end_of_grid);
  if (error.empty()) return;
  for (auto& set : threads) set.clear();  // some are in the middle of the kernel
  throw std::runtime_error("CUDA emulation: " + error);
}

}  // namespace emulation

extern "C" {
[[gnu::visibility("hidden")]] int32_t aoti_torch_create_device_guard(int32_t, void**) { return 0; }
[[gnu::visibility("hidden")]] int32_t aoti_torch_delete_device_guard(void*) { return 0; }
}
