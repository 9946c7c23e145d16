// Loaded before the C library (LD_PRELOAD): one call of the system or of the allocator fails, by its number.
//
//     TASKVEC_FAULT_KIND    system or memory
//     TASKVEC_FAULT_AT      the number of the call that fails, from 1; 0: none does
//     TASKVEC_FAULT_ON      set: all calls from that number on fail
//     TASKVEC_FAULT_NO_EXCHANGE   set: directories cannot be exchanged, as on some file systems
//     TASKVEC_FAULT_COUNT   a file that gets the number of calls, for whoever wants to try each
//
// Calls that only undo (unlink, rmdir, close, munmap) never fail: nothing could be said of what they leave.
// SPDX-License-Identifier: Apache-2.0
#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);
}

namespace {

enum class fault : int { none, system, memory };
fault kind = fault::none;
long failing = 0;
bool from_then_on = false;
std::atomic<long> calls{0};

/// Before the constructors of the libraries that allocate.
[[gnu::constructor(101)]] void read_environment()
{
    const char* const which = std::getenv("TASKVEC_FAULT_KIND");
    const char* const at = std::getenv("TASKVEC_FAULT_AT");
    failing = at ? std::atol(at) : 0;
    from_then_on = std::getenv("TASKVEC_FAULT_ON") != nullptr;
    kind = !which ? fault::none : *which == 's' ? fault::system : fault::memory;
}

/// Once all else has ended. The raw calls are not counted.
[[gnu::destructor(101)]] void write_count()
{
    const char* const path = std::getenv("TASKVEC_FAULT_COUNT");
    if (!path) { return; }
    char text[32];
    const int size = std::snprintf(text, sizeof text, "%ld", calls.load());
    const auto file = static_cast<int>(::syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC, 0600));
    (void)::syscall(SYS_write, file, text, static_cast<std::size_t>(size));
    (void)::syscall(SYS_close, file);
}

bool fails(fault here, int code)
{
    if (kind != here) { return false; }
    const long number = calls.fetch_add(1) + 1;
    if (failing == 0 || number < failing || (number > failing && !from_then_on)) { return false; }
    errno = code;
    return true;
}

template <class F>
F* real(const char* name)
{
    return reinterpret_cast<F*>(::dlsym(RTLD_NEXT, name));
}

} // namespace

extern "C" {

void* malloc(std::size_t size)
{
    return fails(fault::memory, ENOMEM) ? nullptr : __libc_malloc(size);
}
void* calloc(std::size_t count, std::size_t size)
{
    return fails(fault::memory, ENOMEM) ? nullptr : __libc_calloc(count, size);
}
void* realloc(void* old, std::size_t size)
{
    return fails(fault::memory, ENOMEM) ? nullptr : __libc_realloc(old, size);
}
void* memalign(std::size_t alignment, std::size_t size)
{
    return fails(fault::memory, ENOMEM) ? nullptr : __libc_memalign(alignment, size);
}
void* aligned_alloc(std::size_t alignment, std::size_t size)
{
    return memalign(alignment, size);
}
int posix_memalign(void** place, std::size_t alignment, std::size_t size)
{
    *place = memalign(alignment, size);
    return *place ? 0 : ENOMEM;
}

int open(const char* path, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    const auto mode = va_arg(rest, mode_t);
    va_end(rest);
    return fails(fault::system, EMFILE) ? -1 : real<int(const char*, int, ...)>("open")(path, flags, mode);
}
int open64(const char* path, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    const auto mode = va_arg(rest, mode_t);
    va_end(rest);
    return fails(fault::system, EMFILE) ? -1 : real<int(const char*, int, ...)>("open64")(path, flags, mode);
}
void* mmap(void* address, std::size_t size, int protection, int flags, int file, off_t offset) noexcept
{
    if (file >= 0 && fails(fault::system, ENOMEM)) { return MAP_FAILED; }
    return real<void*(void*, std::size_t, int, int, int, off_t)>("mmap")(
        address, size, protection, flags, file, offset);
}
ssize_t write(int file, const void* data, std::size_t size)
{
    if (file != STDERR_FILENO && fails(fault::system, EIO)) { return -1; } // what is said is what is looked at
    return real<ssize_t(int, const void*, std::size_t)>("write")(file, data, size);
}
ssize_t pwrite(int file, const void* data, std::size_t size, off_t offset)
{
    return fails(fault::system, ENOSPC)
        ? -1
        : real<ssize_t(int, const void*, std::size_t, off_t)>("pwrite")(file, data, size, offset);
}
int fallocate(int file, int mode, off_t offset, off_t size)
{
    return fails(fault::system, ENOSPC) ? -1 : real<int(int, int, off_t, off_t)>("fallocate")(file, mode, offset, size);
}
int ftruncate(int file, off_t size) noexcept
{
    return fails(fault::system, EIO) ? -1 : real<int(int, off_t)>("ftruncate")(file, size);
}
int fsync(int file)
{
    (void)file; // a success takes no time: nothing here cuts the power
    return fails(fault::system, EIO) ? -1 : 0;
}
int fchmod(int file, mode_t mode) noexcept
{
    return fails(fault::system, EIO) ? -1 : real<int(int, mode_t)>("fchmod")(file, mode);
}
int mkdir(const char* path, mode_t mode) noexcept
{
    return fails(fault::system, ENOSPC) ? -1 : real<int(const char*, mode_t)>("mkdir")(path, mode);
}
int link(const char* from, const char* to) noexcept
{
    return fails(fault::system, EMLINK) ? -1 : real<int(const char*, const char*)>("link")(from, to);
}
int rename(const char* from, const char* to) noexcept
{
    return fails(fault::system, EIO) ? -1 : real<int(const char*, const char*)>("rename")(from, to);
}
int renameat2(int from_directory, const char* from, int to_directory, const char* to, unsigned flags) noexcept
{
    if (std::getenv("TASKVEC_FAULT_NO_EXCHANGE")) {
        errno = EINVAL;
        return -1;
    }
    return fails(fault::system, EIO) ? -1
                                     : real<int(int, const char*, int, const char*, unsigned)>("renameat2")(
                                           from_directory, from, to_directory, to, flags);
}
int lock(int file, int operation) noexcept __asm__("flock"); // a struct has the name
int lock(int file, int operation) noexcept
{
    return fails(fault::system, ENOLCK) ? -1 : real<int(int, int)>("flock")(file, operation);
}

} // extern "C"
