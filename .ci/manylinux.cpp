// What the headers of newer compilers call in newer libraries than those of manylinux_2_28, defined in the kernels.

#include <new>
#include <sstream>

#define HIDDEN __attribute__((visibility("hidden")))

// glibc 2.32: whether a process has one thread, so that reference counts need not be atomic. They always are here.
extern "C" HIDDEN const char always_threaded asm("__libc_single_threaded") = 0;

// libstdc++ of GCC 11, and of GCC 9.
extern "C" HIDDEN void throw_length() asm("_ZSt28__throw_bad_array_new_lengthv");
void throw_length() { throw std::bad_array_new_length(); }
template std::basic_stringstream<char>::basic_stringstream();
template std::basic_ostringstream<char>::basic_ostringstream();
