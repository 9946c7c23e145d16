// Loaded before the C library (LD_PRELOAD): one call of the system or of the allocator fails, by its number.
// SPDX-License-Identifier: Apache-2.0
//
//     TASKVEC_FAULT_KIND    system or memory
//     TASKVEC_FAULT_AT      the number of the call that fails, from 1; 0: none does
//     TASKVEC_FAULT_ON      set: all calls from that number on fail
//     TASKVEC_FAULT_RUN     a command for the shell that is run at that call of the system instead, which does not fail
//     TASKVEC_FAULT_NO_EXCHANGE   set: directories cannot be exchanged, as on some file systems
//     TASKVEC_FAULT_COUNT   a file that gets the number of calls, for whoever wants to try each
//     TASKVEC_FAULT_TRACE   a directory that gets a list, `calls`, of all that changes files and directories, and under
//                           their numbers there what files hold when they are forced to disk
//
// Calls that only undo (unlink, rmdir, close, munmap) never fail: nothing could be said of what they leave.
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
#include <sys/wait.h>
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
const char* run_instead = nullptr;
std::atomic<long> calls{0};

/// Before the constructors of the libraries that allocate.
[[gnu::constructor(101)]] void read_environment()
{
    const char* const which = std::getenv("TASKVEC_FAULT_KIND");
    const char* const at = std::getenv("TASKVEC_FAULT_AT");
    failing = at ? std::atol(at) : 0;
    from_then_on = std::getenv("TASKVEC_FAULT_ON") != nullptr;
    run_instead = std::getenv("TASKVEC_FAULT_RUN");
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

/// What another process does meanwhile.
void run_command()
{
    const pid_t child = ::fork();
    if (child == 0) {
        ::unsetenv("LD_PRELOAD");
        ::execl("/bin/sh", "sh", "-c", run_instead, static_cast<char*>(nullptr));
        ::_exit(127);
    }
    int status = 0;
    while (::waitpid(child, &status, 0) < 0 && errno == EINTR) { }
}

bool fails(fault here, int code)
{
    if (kind != here) { return false; }
    const long number = calls.fetch_add(1) + 1;
    if (failing == 0 || number < failing || (number > failing && !from_then_on)) { return false; }
    if (run_instead) {
        run_command();
        return false;
    }
    errno = code;
    return true;
}

template <class F>
F* real(const char* name)
{
    return reinterpret_cast<F*>(::dlsym(RTLD_NEXT, name));
}

// The trace, by raw calls and without memory.

int trace_calls = -1;
const char* trace_folder = nullptr;
int snapshots = 0;

/// Begins when the first call asks.
bool tracing()
{
    static bool asked = false;
    if (!asked) {
        asked = true;
        trace_folder = std::getenv("TASKVEC_FAULT_TRACE");
        if (trace_folder) {
            char path[4096];
            std::snprintf(path, sizeof path, "%s/calls", trace_folder);
            trace_calls = static_cast<int>(
                ::syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600));
        }
    }
    return trace_calls >= 0;
}

/// A path from the root, of a name in a directory that is open.
struct whole_path {
    char text[8192];
    whole_path(int directory, const char* name)
    {
        text[0] = 0;
        if (*name == '/') {
            std::snprintf(text, sizeof text, "%s", name);
            return;
        }
        char link[64];
        std::snprintf(link, sizeof link, directory == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", directory);
        const long size = ::syscall(SYS_readlinkat, AT_FDCWD, link, text, std::size_t{4096});
        if (size > 0) { std::snprintf(text + size, sizeof text - static_cast<std::size_t>(size), "/%s", name); }
    }
};

unsigned long number_of(const char* path)
{
    struct stat status{};
    return ::fstatat(AT_FDCWD, path, &status, AT_SYMLINK_NOFOLLOW) == 0 ? static_cast<unsigned long>(status.st_ino) : 0;
}

/// A line of the list.
void trace(const char* what, const char* first, const char* second, unsigned long number, int snapshot)
{
    static char line[20000];
    const int size = std::snprintf(line, sizeof line, "%s\t%s\t%s\t%lu\t%d\n", what, first, second, number, snapshot);
    (void)::syscall(SYS_write, trace_calls, line, static_cast<std::size_t>(size));
}

void trace_written(int file)
{
    struct stat status{};
    if (!tracing() || ::fstat(file, &status) != 0 || !S_ISREG(status.st_mode)) { return; }
    trace("write", "", "", static_cast<unsigned long>(status.st_ino), 0);
}

void trace_forced(int file)
{
    struct stat status{};
    if (!tracing() || ::fstat(file, &status) != 0) { return; }
    if (S_ISREG(status.st_mode)) {
        char path[4096];
        std::snprintf(path, sizeof path, "%s/%d", trace_folder, ++snapshots);
        const auto to =
            static_cast<int>(::syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
        char piece[4096];
        off_t at = 0;
        for (long size = 0; (size = ::syscall(SYS_pread64, file, piece, sizeof piece, at)) > 0; at += size) {
            (void)::syscall(SYS_write, to, piece, static_cast<std::size_t>(size));
        }
        (void)::syscall(SYS_close, to);
    }
    trace("force", "", "", static_cast<unsigned long>(status.st_ino), S_ISREG(status.st_mode) ? snapshots : 0);
}

void trace_names(const char* what, const char* from, const char* to)
{
    if (!tracing()) { return; }
    const whole_path first(AT_FDCWD, from), second(AT_FDCWD, to);
    trace(what, first.text, second.text, number_of(second.text), 0);
}

int opened(const char* name, const char* path, int flags, mode_t mode)
{
    if (fails(fault::system, EMFILE)) { return -1; }
    const bool made = (flags & O_CREAT) != 0 && tracing() && number_of(path) == 0;
    const int file = real<int(const char*, int, ...)>(name)(path, flags, mode);
    if (file >= 0 && made) {
        const whole_path whole(AT_FDCWD, path);
        trace("create", whole.text, "", number_of(whole.text), 0);
    }
    return file;
}

int removed(int directory, const char* name, int flags, int result)
{
    if (result == 0 && tracing()) {
        const whole_path whole(directory, name);
        trace((flags & AT_REMOVEDIR) != 0 ? "rmdir" : "unlink", whole.text, "", 0, 0);
    }
    return result;
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
    return opened("open", path, flags, mode);
}
int open64(const char* path, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    const auto mode = va_arg(rest, mode_t);
    va_end(rest);
    return opened("open64", path, flags, mode);
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
    if (fails(fault::system, ENOSPC)) { return -1; }
    trace_written(file);
    return real<ssize_t(int, const void*, std::size_t, off_t)>("pwrite")(file, data, size, offset);
}
int fallocate(int file, int mode, off_t offset, off_t size)
{
    if (fails(fault::system, ENOSPC)) { return -1; }
    trace_written(file);
    return real<int(int, int, off_t, off_t)>("fallocate")(file, mode, offset, size);
}
int ftruncate(int file, off_t size) noexcept
{
    if (fails(fault::system, EIO)) { return -1; }
    trace_written(file);
    return real<int(int, off_t)>("ftruncate")(file, size);
}
int fsync(int file)
{
    if (fails(fault::system, EIO)) { return -1; }
    trace_forced(file);
    return 0; // takes no time: nothing here cuts the power
}
int fchmod(int file, mode_t mode) noexcept
{
    return fails(fault::system, EIO) ? -1 : real<int(int, mode_t)>("fchmod")(file, mode);
}
int mkdir(const char* path, mode_t mode) noexcept
{
    if (fails(fault::system, ENOSPC)) { return -1; }
    const int result = real<int(const char*, mode_t)>("mkdir")(path, mode);
    if (result == 0 && tracing()) {
        const whole_path whole(AT_FDCWD, path);
        trace("mkdir", whole.text, "", number_of(whole.text), 0);
    }
    return result;
}
int link(const char* from, const char* to) noexcept
{
    if (fails(fault::system, EMLINK)) { return -1; }
    const int result = real<int(const char*, const char*)>("link")(from, to);
    if (result == 0) { trace_names("link", from, to); }
    return result;
}
int rename(const char* from, const char* to) noexcept
{
    if (fails(fault::system, EIO)) { return -1; }
    const int result = real<int(const char*, const char*)>("rename")(from, to);
    if (result == 0) { trace_names("rename", from, to); }
    return result;
}
int renameat2(int from_directory, const char* from, int to_directory, const char* to, unsigned flags) noexcept
{
    if (std::getenv("TASKVEC_FAULT_NO_EXCHANGE")) {
        errno = EINVAL;
        return -1;
    }
    if (fails(fault::system, EIO)) { return -1; }
    const int result = real<int(int, const char*, int, const char*, unsigned)>("renameat2")(
        from_directory, from, to_directory, to, flags);
    if (result == 0) { trace_names("exchange", from, to); }
    return result;
}
int unlink(const char* path) noexcept
{
    return removed(AT_FDCWD, path, 0, real<int(const char*)>("unlink")(path));
}
int rmdir(const char* path) noexcept
{
    return removed(AT_FDCWD, path, AT_REMOVEDIR, real<int(const char*)>("rmdir")(path));
}
int unlinkat(int directory, const char* name, int flags) noexcept
{
    return removed(directory, name, flags, real<int(int, const char*, int)>("unlinkat")(directory, name, flags));
}
int lock(int file, int operation) noexcept __asm__("flock"); // a struct has the name
int lock(int file, int operation) noexcept
{
    return fails(fault::system, ENOLCK) ? -1 : real<int(int, int)>("flock")(file, operation);
}

} // extern "C"
