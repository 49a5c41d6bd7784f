// The standard headers of simt.h, which emulator.py compiles once and puts before each module.

#include <cstdarg>
#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <ucontext.h>
#include <utility>
#include <vector>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif
