// SPDX-License-Identifier: Apache-2.0
#include "memory.hpp"

#include <cstdlib>

#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define VIT_COUNTS_MEMORY 1
#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#undef VIT_COUNTS_MEMORY
#endif
#endif
#endif

#if defined(VIT_COUNTS_MEMORY)

#include <atomic>
#include <cerrno>

#include <malloc.h>

namespace {
std::atomic<std::size_t> held{0}, peak{0}, start{0};

void* counted(void* block)
{
    if (block) {
        const std::size_t now = held += malloc_usable_size(block);
        for (std::size_t before = peak; before < now && !peak.compare_exchange_weak(before, now);) { }
    }
    return block;
}
void uncount(void* block)
{
    if (block) { held -= malloc_usable_size(block); }
}
} // namespace

// glibc lets a program define these; its own are still there under the names below.
extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);
void __libc_free(void*);

void* malloc(std::size_t size)
{
    return counted(__libc_malloc(size));
}
void* calloc(std::size_t count, std::size_t size)
{
    return counted(__libc_calloc(count, size));
}
void* realloc(void* block, std::size_t size)
{
    uncount(block);
    void* const moved = __libc_realloc(block, size);
    if (!moved && size != 0 && block) { held += malloc_usable_size(block); }
    return counted(moved);
}
void* memalign(std::size_t alignment, std::size_t size)
{
    return counted(__libc_memalign(alignment, size));
}
void* aligned_alloc(std::size_t alignment, std::size_t size)
{
    return counted(__libc_memalign(alignment, size));
}
int posix_memalign(void** out, std::size_t alignment, std::size_t size)
{
    void* const block = counted(__libc_memalign(alignment, size));
    if (!block) { return ENOMEM; }
    *out = block;
    return 0;
}
void free(void* block)
{
    uncount(block);
    __libc_free(block);
}
}

namespace vit {
void start_peak()
{
    start = held.load();
    peak = held.load();
}
std::optional<std::size_t> peak_bytes()
{
    return peak - start;
}
} // namespace vit

#else

namespace vit {
void start_peak() { }
std::optional<std::size_t> peak_bytes()
{
    return std::nullopt;
}
} // namespace vit

#endif
