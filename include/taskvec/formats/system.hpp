// What files need of the operating system: one body for POSIX, one for Windows. Internal: formats/file.hpp stands on
// it.
// SPDX-License-Identifier: Apache-2.0
//
// Functions take paths as std::filesystem has them, give what the calls of POSIX of their kind give (−1 and errno where
// they fail), and throw nothing but for memory.
#pragma once

#include <taskvec/core/config.hpp>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#if defined(_WIN32)
#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#endif
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <fcntl.h>
#include <io.h>
#include <windows.h>
#else
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h> // renameat2
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#if defined(__linux__)
#include <linux/magic.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#endif
#include <unistd.h>
#endif

namespace taskvec::inline TASKVEC_ABI {
namespace detail {

#if !defined(_WIN32)
static_assert(sizeof(::off_t) == 8, "taskvec's files need 64-bit offsets: compile with -D_FILE_OFFSET_BITS=64");
#endif

/// The system's words for an errno.
[[nodiscard]] inline std::string errno_text(int code)
{
#if defined(_WIN32)
    return std::generic_category().message(code); // the system's own numbers are others there
#else
    return std::system_category().message(code);
#endif
}

/// Calls a system function again for as long as a signal interrupts it.
template <class Call>
auto retry(Call call)
{
    for (;;) {
        const auto result = call();
        if (result >= 0 || errno != EINTR) { return result; }
    }
}

/// A name as text: as it is (no copy), or of wide characters in UTF-8.
#if defined(_WIN32)
[[nodiscard]] inline std::string name_text(const std::filesystem::path& path)
{
    const auto text = path.u8string();
    return {reinterpret_cast<const char*>(text.data()), text.size()};
}
#else
[[nodiscard]] inline const std::string& name_text(const std::filesystem::path& path) noexcept
{
    return path.native();
}
#endif

/// And back.
[[nodiscard]] inline std::filesystem::path path_of(std::string_view text)
{
#if defined(_WIN32)
    return std::u8string_view(reinterpret_cast<const char8_t*>(text.data()), text.size());
#else
    return text;
#endif
}

} // namespace detail

namespace detail::system {

/// What is known of a file.
struct status {
    bool is_file = false, is_directory = false;
    std::uint64_t device = 0, inode = 0, size = 0;
    std::int64_t seconds = 0, nanoseconds = 0; ///< when it was written to
    unsigned mode = 0, owner = 0, group = 0; ///< 0 on Windows
};

#if !defined(_WIN32)

inline bool known(const struct stat& from, status& to) noexcept
{
    to = {S_ISREG(from.st_mode), S_ISDIR(from.st_mode), static_cast<std::uint64_t>(from.st_dev),
        static_cast<std::uint64_t>(from.st_ino), static_cast<std::uint64_t>(from.st_size), from.st_mtim.tv_sec,
        from.st_mtim.tv_nsec, from.st_mode, from.st_uid, from.st_gid};
    return true;
}
/// False, and errno, where nothing is known.
inline bool look_at(const std::filesystem::path& path, status& found) noexcept
{
    struct stat raw{};
    return ::stat(path.c_str(), &raw) == 0 && known(raw, found);
}
inline bool look_at_link(const std::filesystem::path& path, status& found) noexcept
{
    struct stat raw{};
    return ::lstat(path.c_str(), &raw) == 0 && known(raw, found);
}
inline bool look_at(int file, status& found) noexcept
{
    struct stat raw{};
    return ::fstat(file, &raw) == 0 && known(raw, found);
}

inline int open_to_read(const std::filesystem::path& path) noexcept
{
    return retry([&] { return ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK); });
}
/// A new file, to read and write.
inline int open_new(const std::filesystem::path& path, bool for_others = true) noexcept
{
    return retry([&] { return ::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, for_others ? 0666 : 0600); });
}
/// A file that is there (or not, where it `may_be_new`), to read and write; no link.
inline int open_to_write(const std::filesystem::path& path, bool may_be_new = false) noexcept
{
    return retry(
        [&] { return ::open(path.c_str(), O_RDWR | (may_be_new ? O_CREAT : 0) | O_CLOEXEC | O_NOFOLLOW, 0666); });
}
inline int close(int file) noexcept
{
    return ::close(file);
}
inline std::ptrdiff_t read_at(int file, void* to, std::size_t size, std::uint64_t offset) noexcept
{
    return retry([&] { return ::pread(file, to, size, static_cast<::off_t>(offset)); });
}
/// Moves at most 0x7ffff000 bytes at once, and may stop early at a signal or a full disk.
inline std::ptrdiff_t write_at(int file, const void* from, std::size_t size, std::uint64_t offset) noexcept
{
    return retry([&] { return ::pwrite(file, from, size, static_cast<::off_t>(offset)); });
}
inline int force_to_disk(int file) noexcept
{
    return retry([&] { return ::fsync(file); });
}
inline int resize(int file, std::uint64_t size) noexcept
{
    return retry([&] { return ::ftruncate(file, static_cast<::off_t>(size)); });
}
/// 0, or an errno: a full disk is found here, where the system can tell.
inline int reserve(int file, std::uint64_t size) noexcept
{
#if defined(__linux__)
    // In memory, reserving means clearing every page: as long as writing it once more. Its free space can be asked.
    struct ::statfs system{};
    if (::fstatfs(file, &system) == 0 && static_cast<std::uint64_t>(system.f_type) == TMPFS_MAGIC) {
        const bool fits = system.f_blocks == 0 // no limit
            || size / static_cast<std::uint64_t>(system.f_bsize) <= static_cast<std::uint64_t>(system.f_bavail);
        return fits ? (resize(file, size) == 0 ? 0 : errno) : ENOSPC;
    }
    if (retry([&] { return ::fallocate(file, 0, 0, static_cast<::off_t>(size)); }) == 0) { return 0; }
    if (errno != EOPNOTSUPP && errno != ENOSYS && errno != EINVAL) { return errno; }
#endif
    return resize(file, size) == 0 ? 0 : errno;
}
/// The nine bits of permissions.
inline int set_permissions(int file, unsigned mode) noexcept
{
    return ::fchmod(file, static_cast<::mode_t>(mode));
}
inline int set_permissions(const std::filesystem::path& path, unsigned mode) noexcept
{
    return ::chmod(path.c_str(), static_cast<::mode_t>(mode));
}

/// A file's bytes, read-only; null and errno where that fails.
inline const std::byte* map(int file, std::size_t size) noexcept
{
    void* const memory = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0);
    return memory == MAP_FAILED ? nullptr : static_cast<const std::byte*>(memory); // NOLINT
}
inline void unmap(const void* memory, std::size_t size) noexcept
{
    ::munmap(const_cast<void*>(memory), size);
}
inline void advise(const std::byte* memory, std::size_t size, int advice) noexcept
{
    ::madvise(const_cast<std::byte*>(memory), size, advice);
}

inline int remove_file(const std::filesystem::path& path) noexcept
{
    return ::unlink(path.c_str());
}
inline int remove_directory(const std::filesystem::path& path) noexcept
{
    return ::rmdir(path.c_str());
}
inline int make_directory(const std::filesystem::path& path, bool for_others = true) noexcept
{
    return ::mkdir(path.c_str(), for_others ? 0777 : 0700);
}
/// Replaces a file.
inline int rename(const std::filesystem::path& from, const std::filesystem::path& to) noexcept
{
    return ::rename(from.c_str(), to.c_str());
}
inline int link(const std::filesystem::path& from, const std::filesystem::path& to) noexcept
{
    return ::link(from.c_str(), to.c_str());
}
/// Two directories take each other's name.
#if defined(RENAME_EXCHANGE)
inline constexpr bool can_exchange = true;
inline int exchange(const std::filesystem::path& one, const std::filesystem::path& other) noexcept
{
    return ::renameat2(AT_FDCWD, one.c_str(), AT_FDCWD, other.c_str(), RENAME_EXCHANGE);
}
#else
inline constexpr bool can_exchange = false;
inline int exchange(const std::filesystem::path&, const std::filesystem::path&) noexcept
{
    errno = ENOSYS;
    return -1;
}
#endif
inline bool may_write(const std::filesystem::path& path) noexcept
{
    return ::access(path.c_str(), W_OK) == 0;
}
inline bool may_fill(const std::filesystem::path& directory) noexcept
{
    return ::access(directory.c_str(), W_OK | X_OK) == 0;
}
/// An exclusive lock that ends with the process; EWOULDBLOCK where somebody else has it.
inline int lock(int file) noexcept
{
    return retry([&] { return ::flock(file, LOCK_EX | LOCK_NB); });
}

[[nodiscard]] inline long process() noexcept
{
    return static_cast<long>(::getpid());
}
[[nodiscard]] inline bool is_gone(int process) noexcept
{
    return ::kill(static_cast<::pid_t>(process), 0) != 0 && errno == ESRCH;
}

#else

/// The errno that fits an error of Windows.
inline int fail() noexcept
{
    switch (::GetLastError()) {
    case ERROR_FILE_NOT_FOUND:
    case ERROR_PATH_NOT_FOUND:
    case ERROR_INVALID_NAME:
    case ERROR_BAD_PATHNAME:
    case ERROR_BAD_NETPATH:
    case ERROR_INVALID_DRIVE: errno = ENOENT; break;
    case ERROR_ACCESS_DENIED:
    case ERROR_SHARING_VIOLATION:
    case ERROR_USER_MAPPED_FILE:
    case ERROR_WRITE_PROTECT: errno = EACCES; break;
    case ERROR_LOCK_VIOLATION: errno = EWOULDBLOCK; break;
    case ERROR_FILE_EXISTS:
    case ERROR_ALREADY_EXISTS: errno = EEXIST; break;
    case ERROR_DISK_FULL:
    case ERROR_HANDLE_DISK_FULL: errno = ENOSPC; break;
    case ERROR_DIR_NOT_EMPTY: errno = ENOTEMPTY; break;
    case ERROR_DIRECTORY: errno = ENOTDIR; break;
    case ERROR_NOT_SAME_DEVICE: errno = EXDEV; break;
    case ERROR_TOO_MANY_OPEN_FILES: errno = EMFILE; break;
    case ERROR_FILENAME_EXCED_RANGE: errno = ENAMETOOLONG; break;
    case ERROR_NOT_ENOUGH_MEMORY:
    case ERROR_OUTOFMEMORY:
    case ERROR_COMMITMENT_LIMIT: errno = ENOMEM; break;
    case ERROR_NOT_SUPPORTED:
    case ERROR_INVALID_FUNCTION: errno = ENOTSUP; break;
    case ERROR_NOACCESS: errno = EFAULT; break;
    case ERROR_INVALID_PARAMETER: errno = EINVAL; break;
    default: errno = EIO;
    }
    return -1;
}
inline HANDLE handle_of(int file) noexcept
{
    return reinterpret_cast<HANDLE>(::_get_osfhandle(file));
}
/// For files that others may rename and remove meanwhile, as they may elsewhere.
inline HANDLE open_handle(const std::filesystem::path& path, DWORD access, DWORD creation, DWORD flags) noexcept
{
    return ::CreateFileW(path.c_str(), access, FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE, nullptr,
        creation, flags, nullptr);
}
inline int open(const std::filesystem::path& path, DWORD access, DWORD creation, DWORD flags) noexcept
{
    const HANDLE handle = open_handle(path, access, creation, flags);
    if (handle == INVALID_HANDLE_VALUE) { return fail(); }
    const int file = ::_open_osfhandle(reinterpret_cast<std::intptr_t>(handle), _O_BINARY | _O_NOINHERIT);
    if (file < 0) { ::CloseHandle(handle); }
    return file;
}

inline bool look_at(HANDLE handle, status& found) noexcept
{
    if (::GetFileType(handle) != FILE_TYPE_DISK) {
        found = {};
        return true;
    }
    BY_HANDLE_FILE_INFORMATION raw{};
    if (!::GetFileInformationByHandle(handle, &raw)) { return fail() == 0; }
    const auto together = [](DWORD high, DWORD low) { return std::uint64_t{high} << 32 | low; };
    const std::uint64_t written = together(raw.ftLastWriteTime.dwHighDateTime, raw.ftLastWriteTime.dwLowDateTime);
    const bool directory = (raw.dwFileAttributes & FILE_ATTRIBUTE_DIRECTORY) != 0;
    const bool link = (raw.dwFileAttributes & FILE_ATTRIBUTE_REPARSE_POINT) != 0;
    found = {!directory && !link, directory && !link, raw.dwVolumeSerialNumber,
        together(raw.nFileIndexHigh, raw.nFileIndexLow), together(raw.nFileSizeHigh, raw.nFileSizeLow),
        static_cast<std::int64_t>(written / 10'000'000), static_cast<std::int64_t>(written % 10'000'000 * 100), 0, 0,
        0};
    return true;
}
inline bool look_at(const std::filesystem::path& path, status& found, DWORD flags = 0) noexcept
{
    const HANDLE handle = open_handle(path, FILE_READ_ATTRIBUTES, OPEN_EXISTING, FILE_FLAG_BACKUP_SEMANTICS | flags);
    if (handle == INVALID_HANDLE_VALUE) { return fail() == 0; }
    const bool known = look_at(handle, found);
    ::CloseHandle(handle);
    return known;
}
inline bool look_at_link(const std::filesystem::path& path, status& found) noexcept
{
    return look_at(path, found, FILE_FLAG_OPEN_REPARSE_POINT);
}
inline bool look_at(int file, status& found) noexcept
{
    return look_at(handle_of(file), found);
}

inline int open_to_read(const std::filesystem::path& path) noexcept
{
    return open(path, GENERIC_READ, OPEN_EXISTING, FILE_FLAG_BACKUP_SEMANTICS); // directories too, which are told apart
}
inline int open_new(const std::filesystem::path& path, bool = true) noexcept
{
    return open(path, GENERIC_READ | GENERIC_WRITE, CREATE_NEW, FILE_ATTRIBUTE_NORMAL);
}
inline int open_to_write(const std::filesystem::path& path, bool may_be_new = false) noexcept
{
    return open(path, GENERIC_READ | GENERIC_WRITE, may_be_new ? OPEN_ALWAYS : OPEN_EXISTING,
        FILE_ATTRIBUTE_NORMAL | FILE_FLAG_OPEN_REPARSE_POINT);
}
inline int close(int file) noexcept
{
    return ::_close(file);
}
inline OVERLAPPED at(std::uint64_t offset) noexcept
{
    OVERLAPPED place{};
    place.Offset = static_cast<DWORD>(offset);
    place.OffsetHigh = static_cast<DWORD>(offset >> 32);
    return place;
}
inline std::ptrdiff_t read_at(int file, void* to, std::size_t size, std::uint64_t offset) noexcept
{
    OVERLAPPED place = at(offset);
    DWORD moved = 0;
    if (::ReadFile(handle_of(file), to, static_cast<DWORD>(std::min<std::size_t>(size, 1u << 30)), &moved, &place)) {
        return static_cast<std::ptrdiff_t>(moved);
    }
    return ::GetLastError() == ERROR_HANDLE_EOF ? 0 : fail();
}
inline std::ptrdiff_t write_at(int file, const void* from, std::size_t size, std::uint64_t offset) noexcept
{
    OVERLAPPED place = at(offset);
    DWORD moved = 0;
    if (::WriteFile(handle_of(file), from, static_cast<DWORD>(std::min<std::size_t>(size, 1u << 30)), &moved, &place)) {
        return static_cast<std::ptrdiff_t>(moved);
    }
    return fail();
}
inline int force_to_disk(int file) noexcept
{
    return ::FlushFileBuffers(handle_of(file)) ? 0 : fail();
}
inline int resize(int file, std::uint64_t size) noexcept
{
    FILE_END_OF_FILE_INFO end{};
    end.EndOfFile.QuadPart = static_cast<LONGLONG>(size);
    return ::SetFileInformationByHandle(handle_of(file), FileEndOfFileInfo, &end, sizeof end) ? 0 : fail();
}
inline int reserve(int file, std::uint64_t size) noexcept
{
    return resize(file, size) == 0 ? 0 : errno;
}
inline int set_permissions(int, unsigned) noexcept
{
    return 0; // a new file has those of its directory
}
inline int set_permissions(const std::filesystem::path&, unsigned) noexcept
{
    return 0;
}

/// A whole file as memory, or new memory that the page file backs.
inline void* map_pages(HANDLE file, std::uint64_t size, bool to_write) noexcept
{
    const HANDLE section = ::CreateFileMappingW(file, nullptr, to_write ? PAGE_READWRITE : PAGE_READONLY,
        static_cast<DWORD>(size >> 32), static_cast<DWORD>(size), nullptr);
    if (!section) {
        fail();
        return nullptr;
    }
    void* const memory =
        ::MapViewOfFile(section, to_write ? FILE_MAP_WRITE : FILE_MAP_READ, 0, 0, static_cast<SIZE_T>(size));
    if (!memory) { fail(); }
    ::CloseHandle(section); // the view keeps it
    return memory;
}
inline const std::byte* map(int file, std::size_t size) noexcept
{
    return static_cast<const std::byte*>(map_pages(handle_of(file), size, false));
}
inline void unmap(const void* memory, std::size_t) noexcept
{
    ::UnmapViewOfFile(memory);
}
inline void advise(const std::byte*, std::size_t, int) noexcept { }

inline int remove_file(const std::filesystem::path& path) noexcept
{
    if (::DeleteFileW(path.c_str())) { return 0; }
    if (::GetLastError() == ERROR_ACCESS_DENIED) {
        const DWORD attributes = ::GetFileAttributesW(path.c_str());
        if (attributes != INVALID_FILE_ATTRIBUTES && (attributes & FILE_ATTRIBUTE_DIRECTORY) != 0) {
            errno = EISDIR;
            return -1;
        }
        ::SetLastError(ERROR_ACCESS_DENIED);
    }
    return fail();
}
inline int remove_directory(const std::filesystem::path& path) noexcept
{
    return ::RemoveDirectoryW(path.c_str()) ? 0 : fail();
}
inline int make_directory(const std::filesystem::path& path, bool = true) noexcept
{
    return ::CreateDirectoryW(path.c_str(), nullptr) ? 0 : fail();
}
inline int rename(const std::filesystem::path& from, const std::filesystem::path& to) noexcept
{
    if (::MoveFileExW(from.c_str(), to.c_str(), MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH)) { return 0; }
    const int failed = fail();
    const DWORD there = ::GetFileAttributesW(to.c_str());
    const bool directory = there != INVALID_FILE_ATTRIBUTES && (there & FILE_ATTRIBUTE_DIRECTORY) != 0;
    if (errno == EACCES && directory) { errno = EEXIST; } // as POSIX says that a directory is in the way
    return failed;
}
inline int link(const std::filesystem::path& from, const std::filesystem::path& to) noexcept
{
    return ::CreateHardLinkW(to.c_str(), from.c_str(), nullptr) ? 0 : fail();
}
inline constexpr bool can_exchange = false;
inline int exchange(const std::filesystem::path&, const std::filesystem::path&) noexcept
{
    errno = ENOSYS;
    return -1;
}
inline bool may_write(const std::filesystem::path& path) noexcept
{
    return ::_waccess(path.c_str(), 2) == 0;
}
inline bool may_fill(const std::filesystem::path& directory) noexcept
{
    return ::_waccess(directory.c_str(), 2) == 0;
}
inline int lock(int file) noexcept
{
    OVERLAPPED far_away = at(std::uint64_t{1} << 62); // a locked byte that is read by nobody
    return ::LockFileEx(handle_of(file), LOCKFILE_EXCLUSIVE_LOCK | LOCKFILE_FAIL_IMMEDIATELY, 0, 1, 0, &far_away)
        ? 0
        : fail();
}

[[nodiscard]] inline long process() noexcept
{
    return static_cast<long>(::GetCurrentProcessId());
}
[[nodiscard]] inline bool is_gone(int process) noexcept
{
    const HANDLE handle = ::OpenProcess(SYNCHRONIZE, FALSE, static_cast<DWORD>(process));
    if (!handle) { return ::GetLastError() == ERROR_INVALID_PARAMETER; }
    const bool ended = ::WaitForSingleObject(handle, 0) == WAIT_OBJECT_0;
    ::CloseHandle(handle);
    return ended;
}

#endif

/// Whether an errno says that two directories cannot be exchanged here.
[[nodiscard]] inline bool is_no_exchange(int code) noexcept
{
    return code == EINVAL || code == ENOSYS || code == ENOTSUP || code == EXDEV || code == EBUSY;
}

} // namespace detail::system

namespace detail {

/// A file descriptor, closed once.
class descriptor {
public:
    descriptor() = default;
    explicit descriptor(int value) noexcept
        : value_(value)
    { }
    descriptor(descriptor&& other) noexcept
        : value_(std::exchange(other.value_, -1))
    { }
    descriptor& operator=(descriptor&& other) noexcept
    {
        if (this != &other) {
            close();
            value_ = std::exchange(other.value_, -1);
        }
        return *this;
    }
    ~descriptor() { close(); }

    [[nodiscard]] int get() const noexcept { return value_; }
    [[nodiscard]] explicit operator bool() const noexcept { return value_ >= 0; }
    /// 0, or the errno of close(2): some file systems report a failed write only here.
    int close() noexcept
    {
        return value_ >= 0 && system::close(std::exchange(value_, -1)) != 0 && errno != EINTR ? errno : 0;
    }

private:
    int value_ = -1;
};

#if !defined(_WIN32)

/// Removes a file, or a directory with all that lies in it. Takes no memory, which may be what has run out.
inline void remove_tree(int parent, const char* name) noexcept
{
    if (::unlinkat(parent, name, 0) == 0 || (errno != EISDIR && errno != EPERM)) { return; }
    for (int tries = 0; tries < 2 && ::unlinkat(parent, name, AT_REMOVEDIR) != 0; ++tries) {
#if defined(__linux__)
        const descriptor directory(::openat(parent, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW));
        alignas(8) char entries[4096]; // of numbers (16 bytes), a length (2), a kind (1), a name
        for (long size = 0;
            directory && (size = ::syscall(SYS_getdents64, directory.get(), entries, sizeof entries)) > 0;) {
            std::uint16_t length = 0;
            for (long at = 0; at < size; at += length) {
                std::memcpy(&length, entries + at + 16, sizeof length);
                const char* const inner = entries + at + 19;
                if (std::strcmp(inner, ".") != 0 && std::strcmp(inner, "..") != 0) {
                    remove_tree(directory.get(), inner);
                }
            }
        }
        if (directory) { continue; }
#endif
        return;
    }
    ::unlinkat(parent, name, AT_REMOVEDIR);
}
inline void remove_tree(const char* path) noexcept
{
    remove_tree(AT_FDCWD, path);
}

} // namespace detail

namespace detail::system {

/// What remove_temporary() does, for handlers of signals: without memory.
inline void remove_by_text(const char* path, bool with_contents) noexcept
{
    if (with_contents) { remove_tree(path); }
    else if (::unlink(path) != 0) {
        ::rmdir(path);
    }
}

/// Calls body(name) for each entry of a directory but itself and the one above; false, and errno, where it cannot be
/// read. Not std::filesystem::directory_iterator, which ends the process where memory runs out.
template <class Body>
bool for_each_name(const std::filesystem::path& directory, Body body)
{
    struct closer {
        void operator()(DIR* handle) const noexcept { ::closedir(handle); }
    };
    const std::unique_ptr<DIR, closer> handle(::opendir(directory.c_str()));
    if (!handle) { return false; }
    while (const auto* const entry = ::readdir(handle.get())) {
        const std::string_view name = entry->d_name;
        if (name != "." && name != "..") { body(name); }
    }
    return true;
}

/// A failure of map_unnamed_file: which step, and the errno.
struct unnamed_failure {
    std::string_view what;
    int code = 0;
    bool of_space = false;
};
/// New memory that a file without a name in `place` backs, or null and what failed.
inline void* map_unnamed(const std::filesystem::path& place, std::size_t bytes, unnamed_failure& failure)
{
    descriptor file(retry([&] { return ::open(place.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600); }));
    if (!file) { // not every file system has files without names
        auto pattern = (place / ".taskvec-XXXXXX").string();
        file = descriptor(::mkostemp(pattern.data(), O_CLOEXEC));
        if (!file) {
            failure = {"cannot create a temporary file in it", errno, false};
            return nullptr;
        }
        ::unlink(pattern.c_str());
    }
    if (const int code = ::posix_fallocate(file.get(), 0, static_cast<::off_t>(bytes))) {
        failure = {"cannot reserve space", code, true};
        return nullptr;
    }
    void* const memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0);
    if (memory != MAP_FAILED) { return memory; } // NOLINT(performance-no-int-to-ptr)
    failure = {"cannot map a temporary file in it", errno, false};
    return nullptr;
}
/// Forces a directory's names to disk: 0, or the errno of a failure that matters. File systems that cannot do so are
/// left to themselves.
inline int synchronise(const std::filesystem::path& directory) noexcept
{
    const descriptor handle(retry([&] { return ::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); }));
    if (!handle || force_to_disk(handle.get()) == 0) { return 0; }
    return errno != EINVAL && errno != ENOTSUP && errno != EROFS ? errno : 0;
}

} // namespace detail::system

namespace detail {

#else

} // namespace detail

namespace detail::system {

template <class Body>
bool for_each_name(const std::filesystem::path& directory, Body body)
{
    WIN32_FIND_DATAW entry{};
    const HANDLE search = ::FindFirstFileW((directory / L"*").c_str(), &entry);
    if (search == INVALID_HANDLE_VALUE) { return fail() == 0; }
    const std::unique_ptr<void, decltype(&::FindClose)> closer(search, &::FindClose);
    do {
        const std::wstring_view name = entry.cFileName;
        if (name != L"." && name != L"..") { body(name); }
    } while (::FindNextFileW(search, &entry));
    return true;
}

struct unnamed_failure {
    std::string_view what;
    int code = 0;
    bool of_space = false;
};
/// (The page file backs it: a file that is mapped cannot go before the map does.)
inline void* map_unnamed(const std::filesystem::path&, std::size_t bytes, unnamed_failure& failure)
{
    void* const memory = map_pages(INVALID_HANDLE_VALUE, bytes, true);
    if (!memory) { failure = {"cannot reserve space", errno, true}; }
    return memory;
}
inline int synchronise(const std::filesystem::path&) noexcept
{
    return 0; // renames are written through
}

} // namespace detail::system

namespace detail {

/// Removes a file, or a directory with all that lies in it.
inline void remove_tree(const std::filesystem::path& path) noexcept
{
    if (system::remove_file(path) == 0 || errno != EISDIR) { return; }
    std::error_code ignored;
    std::filesystem::remove_all(path, ignored);
}

} // namespace detail

namespace detail::system {

/// What remove_temporary() does.
inline void remove_by_text(const char* text, bool with_contents) noexcept
{
    const auto path = path_of(text);
    if (with_contents) { remove_tree(path); }
    else if (remove_file(path) != 0) {
        remove_directory(path);
    }
}

} // namespace detail::system

namespace detail {

#endif

} // namespace detail
} // namespace taskvec::inline TASKVEC_ABI
