// Stacks that take turns on one thread of the CPU, and what the sanitizers are told of them.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <new>

// Null without the sanitizer.
extern "C" {
[[gnu::weak]] void* __tsan_get_current_fiber();
[[gnu::weak]] void* __tsan_create_fiber(unsigned flags);
[[gnu::weak]] void __tsan_switch_to_fiber(void* fiber, unsigned flags);
[[gnu::weak]] void __tsan_acquire(void* address);
[[gnu::weak]] void __tsan_release(void* address);
[[gnu::weak]] void AnnotateIgnoreWritesBegin(const char* file, int line);
[[gnu::weak]] void AnnotateIgnoreWritesEnd(const char* file, int line);
[[gnu::weak]] void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
[[gnu::weak]] void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
}

namespace emulation {
namespace {

// What a fiber does before it releases an address comes before what another does after it acquires this address.
void acquire(void* address) {
  if (__tsan_acquire) __tsan_acquire(address);
}
void release(void* address) {
  if (__tsan_release) __tsan_release(address);
}

// Memory that is allocated in this scope is new to all fibers.
struct NewMemory {
  NewMemory() {
    if (AnnotateIgnoreWritesBegin) AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~NewMemory() {
    if (AnnotateIgnoreWritesEnd) AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  }
};

class Fiber {
 public:
  // The stack that runs already.
  Fiber() : tsan_(__tsan_get_current_fiber ? __tsan_get_current_fiber() : nullptr) {}

  // A new stack, on which main runs, and never returns, once another fiber has switched to it.
  explicit Fiber(void (*main)()) : main_(main), size_(kStackBytes) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    bottom_ = stack;
    if (__tsan_create_fiber) tsan_ = __tsan_create_fiber(0);
  }

  Fiber(const Fiber&) = delete;
  ~Fiber() {
    if (size_ == kStackBytes) munmap(const_cast<void*>(bottom_), kStackBytes);
  }

  // Goes on with another stack, until one switches back to this. Nothing orders what both do.
  [[gnu::noinline]] void switch_to(Fiber& other) {
    left_ = this;
    entered_ = &other;
    if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(other.tsan_, 1);
    if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&fake_stack_, other.bottom_, other.size_);
    if (__builtin_setjmp(registers_) == 0) {
      if (other.has_begun_) __builtin_longjmp(other.registers_, 1);
      ucontext_t context;
      getcontext(&context);
      context.uc_stack.ss_sp = const_cast<void*>(other.bottom_);
      context.uc_stack.ss_size = other.size_;
      makecontext(&context, begin, 0);
      setcontext(&context);
    }
    entered_->finish_switch();
  }

 private:
  static constexpr size_t kStackBytes = 256 << 10;

  static void begin() {
    entered_->has_begun_ = true;
    entered_->finish_switch();
    entered_->main_();
  }

  void finish_switch() {
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(fake_stack_, &left_->bottom_, &left_->size_);
  }

  static Fiber *left_, *entered_;

  void (*main_)() = nullptr;
  bool has_begun_ = main_ == nullptr;
  void* registers_[5];
  void *tsan_ = nullptr, *fake_stack_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
};

Fiber *Fiber::left_, *Fiber::entered_;

}  // namespace
}  // namespace emulation
