// Files: read-only memory maps, and files that appear whole or not at all.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/error.hpp>
#include <taskvec/core/parallel.hpp>
#include <taskvec/formats/system.hpp>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <limits>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Called where a directory could not be forced to disk after the files in it had taken their names: they are in place,
/// and only a power cut could still undo that. That is no error, since nothing can be taken back.
using unsynchronised_handler = void (*)(const std::filesystem::path& directory, int code);

namespace detail {

[[noreturn]] inline void raise_io(const std::filesystem::path& path, std::string_view what, int code)
{
    raise<io_error>(system_error_code(code), message(what, ": ", errno_text(code)), path.string(), code);
}

/// The directory that holds `path`, "." where it names none.
[[nodiscard]] inline std::filesystem::path directory_of(const std::filesystem::path& path)
{
    return path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
}

inline std::atomic<unsynchronised_handler>& unsynchronised_slot() noexcept
{
    static std::atomic<unsynchronised_handler> handler{nullptr};
    return handler;
}

/// Makes renames in a directory durable. File systems that cannot do so are left to themselves; a failure is told to
/// the handler.
inline void synchronise_directory(const std::filesystem::path& directory)
{
    const int code = system::synchronise(directory);
    if (code == 0) { return; }
    if (const auto handler = unsynchronised_slot().load()) { handler(directory, code); }
}

/// Maps `bytes` (not 0) of a new file that has no name and is gone with the map: system::unmap() gives it back.
/// `folder`: where it lies (empty: here). `what`: for whom, in messages.
[[nodiscard]] inline void* map_unnamed_file(
    const std::filesystem::path& folder, std::uint64_t bytes, std::string_view what)
{
    const auto place = folder.empty() ? std::filesystem::path(".") : folder;
    if (bytes > std::numeric_limits<std::size_t>::max()) {
        raise_io(place, message("cannot map ", bytes, " bytes for ", what, " in a 32-bit program"), EFBIG);
    }
    system::unnamed_failure failure{};
    void* const memory = system::map_unnamed(place, static_cast<std::size_t>(bytes), failure);
    if (!memory) {
        raise_io(
            place, failure.of_space ? message(failure.what, " for ", what) : std::string(failure.what), failure.code);
    }
    return memory;
}

} // namespace detail

/// Sets what hears of directories that could not be forced to disk; returns what heard of them before (at first:
/// nothing).
inline unsynchronised_handler set_unsynchronised_handler(unsynchronised_handler handler) noexcept
{
    return detail::unsynchronised_slot().exchange(handler);
}

/// A whole regular file, mapped read-only and private. Move-only; the address does not change when the object moves.
///
/// The bytes follow the file: a file that another process shortens while it is mapped makes reads beyond its new end
/// raise SIGBUS, which a library cannot turn into an error. Replacing a file by rename, as this library does, is safe.
/// Throws io_error for what is missing, unreadable, or not a regular file. Cost: no byte is read.
class mapped_file {
public:
    mapped_file() = default;
    /// Maps the file.
    explicit mapped_file(std::filesystem::path path)
        : path_(std::move(path))
    {
        const detail::descriptor file(detail::system::open_to_read(path_));
        if (!file) { detail::raise_io(path_, "cannot open for reading", errno); }
        detail::system::status status;
        if (!detail::system::look_at(file.get(), status)) {
            detail::raise_io(path_, "cannot read the file's size", errno);
        }
        if (!status.is_file) {
            raise<io_error>(error_code::file_kind,
                status.is_directory ? "is a directory; expected a file" : "is not a regular file", path_.string());
        }
        opened_ = identity(status);
        if (opened_.size > std::numeric_limits<std::size_t>::max()) {
            detail::raise_io(
                path_, message("has ", opened_.size, " bytes, more than a 32-bit program can map into memory"), EFBIG);
        }
        if (opened_.size == 0) { return; }
        data_ = detail::system::map(file.get(), static_cast<std::size_t>(opened_.size));
        if (!data_) { detail::raise_io(path_, "cannot map the file into memory", errno); }
        size_ = static_cast<std::size_t>(opened_.size);
    }
    mapped_file(mapped_file&& other) noexcept
        : path_(std::move(other.path_))
        , data_(std::exchange(other.data_, nullptr))
        , size_(std::exchange(other.size_, 0))
        , opened_(other.opened_)
    { }
    mapped_file& operator=(mapped_file&& other) noexcept
    {
        if (this != &other) {
            unmap();
            path_ = std::move(other.path_);
            data_ = std::exchange(other.data_, nullptr);
            size_ = std::exchange(other.size_, 0);
            opened_ = other.opened_;
        }
        return *this;
    }
    ~mapped_file() { unmap(); }

    /// What tells one state of a file from another: where it lies on the disk, its size, when it was written to.
    struct identity {
        std::uint64_t device = 0, inode = 0, size = 0; ///< of the file system, in it, in bytes
        std::int64_t seconds = 0, nanoseconds = 0; ///< of the last write

        identity() = default;
        /// Of what the system says of a file.
        explicit identity(const detail::system::status& status) noexcept
            : device(status.device)
            , inode(status.inode)
            , size(status.size)
            , seconds(status.seconds)
            , nanoseconds(status.nanoseconds)
        { }
        bool operator==(const identity&) const = default;
    };
    /// The file as it was when it was opened.
    [[nodiscard]] const identity& opened() const noexcept { return opened_; }
    /// Throws io_error (file_changed) where the file at `path` is no longer the one that was `opened`: shortened,
    /// written to, replaced, removed.
    static void check_unchanged(const std::filesystem::path& path, const identity& opened)
    {
        detail::system::status status;
        if (detail::system::look_at(path, status) && identity(status) == opened) { return; }
        raise<io_error>(error_code::file_changed,
            "changed while it was being read: what was computed from it may mix old and new bytes; run again when "
            "nothing else writes to it",
            path.string());
    }
    void check_unchanged() const { check_unchanged(path_, opened_); }

    /// The file's path.
    [[nodiscard]] const std::filesystem::path& path() const noexcept { return path_; }
    /// The file's bytes, which stay where they are as long as the map lives.
    [[nodiscard]] std::span<const std::byte> bytes() const& noexcept { return {data_, size_}; }
    void bytes() const&& = delete; // name the owner first: its views would dangle

    /// How the bytes will be read: MADV_SEQUENTIAL, MADV_RANDOM, MADV_WILLNEED, MADV_NORMAL. A hint: failure is
    /// ignored, and so is all of it on Windows.
    void advise(int advice) const noexcept
    {
        if (size_) { detail::system::advise(data_, size_, advice); }
    }

private:
    void unmap() noexcept
    {
        if (data_) { detail::system::unmap(data_, size_); }
    }

    std::filesystem::path path_;
    const std::byte* data_ = nullptr;
    std::size_t size_ = 0;
    identity opened_;
};

/// Whether a finished file is forced to disk before it takes its name.
enum class durability : std::uint8_t {
    synchronised, ///< fsync the file, rename, fsync the directory: survives a power cut as the old file or the new
    process ///< rename only: survives a killed process as the old file or the new
};

/// Called where a temporary file, a directory or a lock was made (`there`) and where it has its real name or is gone,
/// for those who must remove it when no destructor can run: in a handler of signals or of std::terminate. May be called
/// by several threads at once. The youngest goes first: files before the directories that they lie in.
using temporary_handler = void (*)(const std::filesystem::path& place, bool there) noexcept;

namespace detail {

inline std::atomic<temporary_handler>& temporary_slot() noexcept
{
    static std::atomic<temporary_handler> handler{nullptr};
    return handler;
}

/// What stands under temporary names.
class temporaries {
public:
    static void add(const std::filesystem::path& place)
    {
        tell(place, true);
#if defined(TASKVEC_NO_EXCEPTIONS)
        const light_lock lock(busy_);
        places_.push_back(place);
#endif
    }
    static void drop(const std::filesystem::path& place) noexcept
    {
        tell(place, false);
#if defined(TASKVEC_NO_EXCEPTIONS)
        const light_lock lock(busy_);
        std::erase(places_, place);
#endif
    }

private:
    static void tell(const std::filesystem::path& place, bool there) noexcept
    {
        if (const auto handler = temporary_slot().load()) { handler(place, there); }
    }
#if defined(TASKVEC_NO_EXCEPTIONS)
    /// An error ends the process without a destructor, and calls this before that.
    static void remove() noexcept
    {
        const light_lock lock(busy_);
        std::error_code ignored;
        for (; !places_.empty(); places_.pop_back()) {
            const std::filesystem::path& place = places_.back();
            // Of the directories only one that is not finished has such a name, and others' files lie in the rest.
            if (place.filename().string().starts_with(".taskvec-")) { std::filesystem::remove_all(place, ignored); }
            else {
                std::filesystem::remove(place, ignored);
            }
        }
    }

    static inline std::atomic_flag busy_;
    static inline std::vector<std::filesystem::path> places_;
    static inline const bool hooked_ = (error_cleanup_slot() = &temporaries::remove, true);
#endif
};

} // namespace detail

/// Sets what hears of temporary names; returns what heard of them before (at first: nothing).
inline temporary_handler set_temporary_handler(temporary_handler handler) noexcept
{
    return detail::temporary_slot().exchange(handler);
}

/// Removes a temporary file or directory that a temporary_handler heard of: a directory with all that lies in it where
/// it is not finished, otherwise only where it is empty. Takes no memory, and may be called by handlers of signals.
inline void remove_temporary(const char* place) noexcept
{
#if defined(_WIN32)
    const std::string_view text = place;
    const auto name = text.substr(text.find_last_of("/\\") + 1); // npos + 1 is 0
#else
    const char* const slash = std::strrchr(place, '/');
    const std::string_view name = slash ? slash + 1 : place;
#endif
    detail::system::remove_by_text(place, name.starts_with(".taskvec-"));
}

/// A file that is written under a temporary name beside its target and takes the target's name on commit().
///
/// Until then, and for ever when the process is killed or commit() is never called, the target stays as it was. The
/// temporary file is called `.taskvec-<process>-<number>.tmp`; the destructor removes it, a killed process leaves it
/// behind. A target that exists keeps its permission bits; a new one follows the umask. A symbolic link is replaced,
/// not followed. A file that is still mapped may be replaced: the map keeps the old bytes. Throws io_error with the
/// errno of whatever the system refuses (a full disk at construction, where space is reserved).
///
///     atomic_file file("out.bin", 1024);
///     file.write(0, data, 1024);
///     file.commit();
class atomic_file {
public:
    /// `size`: the bytes that the file will have, reserved at once.
    explicit atomic_file(
        std::filesystem::path target, std::uint64_t size = 0, durability mode = durability::synchronised)
        : atomic_file(begun{}, std::move(target), mode) // what throws from here on is cleared up by the destructor
    {
        if (!target_.has_filename()) {
            raise<io_error>(error_code::file_kind, "names no file", target_.string(), EISDIR);
        }
        detail::system::status status;
        const bool exists = detail::system::look_at(target_, status);
        if (exists && status.is_directory) {
            raise<io_error>(error_code::file_kind, "is a directory; name a file to write", target_.string(), EISDIR);
        }
        if (exists && !status.is_file) {
            raise<io_error>(error_code::file_kind, "exists and is not a regular file; choose another output",
                target_.string(), EEXIST);
        }
        if (exists && !detail::system::may_write(target_)) {
            detail::raise_io(target_, "exists and may not be written", errno);
        }
        const auto directory = detail::directory_of(target_);
        static std::atomic<unsigned> counter{0};
        for (;;) {
            temporary_ = directory
                / message(".taskvec-", detail::system::process(), '-', counter.fetch_add(1, std::memory_order_relaxed),
                    ".tmp");
            file_ = detail::descriptor(detail::system::open_new(temporary_));
            if (file_) {
                (void)detail::system::lock(file_.get()); // see is_in_use()
                detail::temporaries::add(temporary_);
                break;
            }
            if (errno != EEXIST) {
                const int code = errno;
                temporary_.clear();
                detail::raise_io(
                    target_, message("cannot create a file in directory '", directory.string(), "'"), code);
            }
        }
        int code = 0;
        std::string_view what;
        if (exists && detail::system::set_permissions(file_.get(), status.mode & 0777) != 0 && errno != EPERM) {
            code = errno;
            what = "cannot give the new file the old one's permissions";
        }
        if (!code && size) {
            code = detail::system::reserve(file_.get(), size);
            what = "cannot reserve the file's space";
        }
        if (code) {
            discard(); // without exceptions no destructor runs
            detail::raise_io(target_, message(what, " (", size, " bytes)"), code);
        }
    }
    atomic_file(atomic_file&& other) noexcept
        : target_(std::move(other.target_))
        , temporary_(std::exchange(other.temporary_, {}))
        , file_(std::move(other.file_))
        , finished_(other.finished_)
        , mode_(other.mode_)
    { }
    atomic_file& operator=(atomic_file&& other) noexcept
    {
        if (this != &other) {
            discard();
            target_ = std::move(other.target_);
            temporary_ = std::exchange(other.temporary_, {});
            file_ = std::move(other.file_);
            finished_ = other.finished_;
            mode_ = other.mode_;
        }
        return *this;
    }
    ~atomic_file() { discard(); }

    /// The path that commit() gives the file.
    [[nodiscard]] const std::filesystem::path& target() const noexcept { return target_; }
    /// The name that the file has until commit(); empty afterwards.
    [[nodiscard]] const std::filesystem::path& temporary() const noexcept { return temporary_; }

    /// Writes all `size` bytes at `offset`. May be called from several threads for ranges that do not overlap.
    void write(std::uint64_t offset, const void* data, std::size_t size)
    {
        const auto* bytes = static_cast<const std::byte*>(data);
        while (size) {
            const auto written = detail::system::write_at(file_.get(), bytes, size, offset);
            if (written <= 0) {
                const int code = written < 0 ? errno : ENOSPC;
                if (code == EFAULT) { // bytes of a map whose file has been shortened: the system sees it before a
                                      // SIGBUS could be raised
                    raise<io_error>(error_code::file_changed,
                        "cannot be written: a model file that is copied from shrank, or its disk failed, "
                        "while it was being read",
                        target_.string(), code);
                }
                detail::raise_io(target_, message("cannot write ", size, " bytes at offset ", offset), code);
            }
            bytes += written;
            offset += static_cast<std::uint64_t>(written);
            size -= static_cast<std::size_t>(written);
        }
    }

    /// Closes the file until open_again(), for those who write more files than a process may have open. Nothing may be
    /// written in between.
    void close_for_now()
    {
        if (const int code = file_.close()) { detail::raise_io(target_, "cannot close the file", code); }
    }
    /// Opens what close_for_now() closed.
    void open_again()
    {
        if (file_) { return; }
        file_ = detail::descriptor(detail::system::open_to_write(temporary_));
        if (!file_) { detail::raise_io(target_, "cannot open the file again", errno); }
        (void)detail::system::lock(file_.get());
    }

    /// Takes the bytes of a finished file in place of its own: another name of it, or a copy where the file system has
    /// no such thing.
    void take(const std::filesystem::path& finished)
    {
        close_for_now();
        detail::system::remove_file(temporary_);
        if (detail::system::link(finished, temporary_) == 0) { return; }
        std::error_code failure;
        std::filesystem::copy_file(finished, temporary_, failure);
        if (failure) {
            detail::raise_io(target_, message("cannot take the bytes of '", finished.string(), "'"), failure.value());
        }
    }

    /// Forces the bytes to disk (unless durability::process) and closes the file; only the rename is left to commit().
    void finish()
    {
        if (finished_) { return; }
        open_again();
        if (mode_ == durability::synchronised && detail::system::force_to_disk(file_.get()) != 0) {
            detail::raise_io(target_, "cannot force the file to disk", errno);
        }
        close_for_now();
        finished_ = true;
    }

    /// Gives the file its name, replacing what had it. `whole_directory`: also make the rename durable.
    void commit(bool whole_directory = true)
    {
        finish();
        const auto directory = detail::directory_of(target_); // after the rename nothing may fail, memory included
        if (detail::system::rename(temporary_, target_) != 0) {
            const int code = errno;
            detail::raise_io(target_, message("cannot rename '", temporary_.string(), "' to it"), code);
        }
        detail::temporaries::drop(temporary_);
        temporary_.clear();
        if (whole_directory && mode_ == durability::synchronised) { detail::synchronise_directory(directory); }
    }

private:
    struct begun { };
    atomic_file(begun, std::filesystem::path target, durability mode)
        : target_(std::move(target))
        , mode_(mode)
    { }
    void discard() noexcept
    {
        file_.close();
        if (!temporary_.empty()) {
            detail::system::remove_file(temporary_);
            detail::temporaries::drop(temporary_);
        }
        temporary_.clear();
    }

    std::filesystem::path target_, temporary_;
    detail::descriptor file_;
    bool finished_ = false;
    durability mode_ = durability::synchronised;
};

/// A directory that one writer has for itself, by an advisory lock (flock) on `.taskvec-lock` in it. The lock ends with
/// its holder, also with a killed process; the file is removed by the destructor, and one that a killed process left is
/// taken over, with the text that it left in it. Throws io_error (EWOULDBLOCK) where another writer holds it. File
/// systems without such locks (some network ones) are written to without.
class directory_lock {
public:
    directory_lock() = default;
    /// Waits for nobody: takes the lock of `directory`, or throws io_error.
    explicit directory_lock(const std::filesystem::path& directory)
        : directory_lock() // what throws from here on is cleared up by the destructor
    {
        path_ = directory / ".taskvec-lock";
        for (;;) {
            file_ = detail::descriptor(detail::system::open_to_write(path_, true));
            if (!file_) { return; } // whatever is wrong with the directory is found when files are made in it
            if (detail::system::lock(file_.get()) != 0) {
                const int code = errno;
                file_.close();
                if (code != EWOULDBLOCK) {
                    detail::system::remove_file(path_);
                    return;
                }
                raise<io_error>(system_error_code(code),
                    "is being written to by another process; wait until it is done, or choose another output",
                    directory.string(), code);
            }
            // The holder before may have removed the file between the two calls: what is locked must be what is there.
            if (is_there()) {
                detail::temporaries::add(path_);
                return;
            }
        }
    }
    directory_lock(const directory_lock&) = delete;
    directory_lock& operator=(const directory_lock&) = delete;
    ~directory_lock()
    {
        if (!file_) { return; }
        if (!kept_ && is_there()) { detail::system::remove_file(path_); }
        detail::temporaries::drop(path_);
    }

    /// The file in the directory, while the lock is held.
    [[nodiscard]] std::filesystem::path path() const { return file_ ? path_ : std::filesystem::path(); }
    /// What note() left here: by a holder that was killed, at first.
    [[nodiscard]] std::string noted() const
    {
        std::string text;
        if (file_) {
            char piece[4096];
            std::ptrdiff_t size = 0;
            while ((size = detail::system::read_at(file_.get(), piece, sizeof piece, text.size())) > 0) {
                text.append(piece, static_cast<std::size_t>(size));
            }
        }
        return text;
    }
    /// Leaves a text for whoever takes the lock over, should this process be killed; on disk when it returns.
    void note(std::string_view text)
    {
        if (!file_) { return; }
        const auto size = static_cast<std::ptrdiff_t>(text.size());
        if (detail::system::resize(file_.get(), 0) != 0
            || detail::system::write_at(file_.get(), text.data(), text.size(), 0) != size
            || detail::system::force_to_disk(file_.get()) != 0) {
            detail::raise_io(path_, "cannot be written", errno);
        }
    }
    /// The file stays when the lock ends, with its text.
    void keep() noexcept { kept_ = true; }

private:
    /// Whether the locked file still has its name: the directory may have been exchanged for another.
    [[nodiscard]] bool is_there() const noexcept
    {
        detail::system::status held, there;
        return detail::system::look_at(file_.get(), held) && detail::system::look_at(path_, there)
            && held.device == there.device && held.inode == there.inode;
    }

    std::filesystem::path path_;
    detail::descriptor file_;
    bool kept_ = false;
};

namespace detail {

/// What is in a directory, the last one in the alphabet first: an adapter's weights before its configuration.
[[nodiscard]] inline std::vector<std::filesystem::path> names_in(const std::filesystem::path& directory)
{
    std::vector<std::filesystem::path> names;
    if (!system::for_each_name(directory, [&](auto name) { names.emplace_back(name); })) {
        raise_io(directory, "cannot be read as a directory", errno);
    }
    std::sort(names.rbegin(), names.rend());
    return names;
}

/// The process that gave a temporary name; 0 where it is none.
[[nodiscard]] inline int process_of_temporary(std::string_view name) noexcept
{
    constexpr std::string_view prefix = ".taskvec-";
    if (!name.starts_with(prefix) || !name.ends_with(".tmp")) { return 0; }
    name.remove_prefix(prefix.size());
    int process = 0;
    const auto [end, failure] = std::from_chars(name.data(), name.data() + name.size(), process);
    return failure == std::errc{} && *end == '-' ? process : 0;
}

/// What follows the name of an old file that has gone aside, and that of a new file where there was no old one.
inline constexpr std::string_view put_aside_ending = ".old", was_not_there_ending = ".new";

} // namespace detail

/// Whether a name is that of a temporary file or directory (`.taskvec-<process>-….tmp`) whose process is no more on
/// this machine.
[[nodiscard]] inline bool is_left_over(std::string_view name) noexcept
{
    const auto process = detail::process_of_temporary(name);
    return process > 0 && detail::system::is_gone(process);
}

/// Whether somebody is writing a temporary file or directory, in whichever container: both are locked meanwhile, on
/// file systems with such locks (flock).
[[nodiscard]] inline bool is_in_use(const std::filesystem::path& temporary) noexcept
{
    const detail::descriptor file(detail::system::open_to_read(temporary));
    return file && detail::system::lock(file.get()) != 0 && errno == EWOULDBLOCK;
}

/// Brings a directory back to what it was before a writer that replaced its files one by one was killed: where new
/// files were still to come, the old ones, which had gone aside, return. Returns the names that did. `lock`: on the
/// directory, held. Called by output_directory.
inline std::vector<std::string> finish_replacements(
    const std::filesystem::path& directory, [[maybe_unused]] const directory_lock& lock)
{
    std::vector<std::string> returned;
    for (const auto& name : detail::names_in(directory)) {
        const auto text = detail::name_text(name);
        const bool dead = is_left_over(text) || detail::process_of_temporary(text) == detail::system::process();
        if (!dead || text.find("-directory-") == std::string::npos) { continue; }
        const auto folder = directory / name;
        detail::system::status status;
        if (!detail::system::look_at_link(folder, status) || !status.is_directory) { continue; }
        std::vector<std::string> aside, added;
        bool to_come = false;
        for (const auto& entry : detail::names_in(folder)) {
            auto inner = detail::name_text(entry);
            const bool old = inner.ends_with(detail::put_aside_ending);
            const bool mark = inner.ends_with(detail::was_not_there_ending);
            to_come = to_come || (!old && !mark);
            if (old) { aside.push_back(std::move(inner)); }
            else if (mark) {
                added.push_back(std::move(inner));
            }
        }
        if (aside.empty() && added.empty()) { continue; } // nothing was moved yet
        if (to_come) {
            for (const auto& mark : added) {
                const auto plain = mark.substr(0, mark.size() - detail::was_not_there_ending.size());
                detail::system::remove_file(directory / detail::path_of(plain));
            }
            for (const auto& old : aside) { // the first to go and the last to come comes back last here too
                auto plain = old.substr(0, old.size() - detail::put_aside_ending.size());
                const auto place = directory / detail::path_of(plain);
                if (detail::system::rename(folder / detail::path_of(old), place) != 0) {
                    detail::raise_io(place, "cannot be given back what a killed run put aside", errno);
                }
                returned.push_back(std::move(plain));
            }
            detail::synchronise_directory(directory);
        }
        detail::remove_tree(folder.c_str());
    }
    return returned;
}

/// What becomes of a directory that exists already.
enum class existing_directory : std::uint8_t {
    fill, ///< files take their names in it one by one
    exchange ///< a sibling, with links to what stays, takes its place in one step, where the system can do that
};

/// A directory that files are written to. One that does not exist appears whole or not at all: it is filled under
/// another name beside its own, `.taskvec-<process>-directory-<number>.tmp`, and takes its own on commit(); until then
/// the destructor removes it, and the directories above it that had to be made. In one that exists, files are written
/// where they belong, each by itself; or, where they belong together (existing_directory::exchange), to a sibling that
/// is exchanged with it on commit(), so that nobody ever sees some of the old and some of the new. That needs Linux, a
/// file system with links, and a directory of one's own without directories in it, which is not the one that this
/// process works in; elsewhere the old files go aside and the new ones take their names, the first in the alphabet (an
/// adapter's configuration) going first and coming last.
/// One writer at a time has an existing directory (see directory_lock). Throws io_error.
///
///     output_directory folder("out/merged");
///     atomic_file file(folder.path() / "a.bin", 4);
///     …
///     file.commit();
///     folder.commit();
class output_directory {
public:
    /// `target`: the directory. What `mode` and `existing` mean is said at their types.
    explicit output_directory(const std::filesystem::path& target, durability mode = durability::synchronised,
        existing_directory existing = existing_directory::fill)
        : output_directory(begun{}, target, mode) // what throws from here on is cleared up by the destructor
    {
        std::error_code ignored;
        if (std::filesystem::exists(target_, ignored)) {
            if (!std::filesystem::is_directory(target_, ignored)) {
                raise<io_error>(error_code::file_kind, "exists and is not a directory; choose another output",
                    target_.string(), ENOTDIR);
            }
            lock_.emplace(target_);
            finish_replacements(target_, *lock_);
            if (existing == existing_directory::exchange) { stage(); }
            return;
        }
        std::vector<std::filesystem::path> missing;
        for (auto level = target_.parent_path(); !level.empty() && !std::filesystem::exists(level, ignored);
            level = level.parent_path()) {
            missing.push_back(level);
        }
        made_.reserve(missing.size() + 1);
        for (; !missing.empty(); missing.pop_back()) { make(std::move(missing.back())); }
        make(path_ = sibling_name());
        lock_new();
    }
    output_directory(const output_directory&) = delete;
    output_directory& operator=(const output_directory&) = delete;
    ~output_directory() { discard(); }

    /// Where to write: under the temporary name where the directory is new.
    [[nodiscard]] const std::filesystem::path& path() const noexcept { return path_; }
    /// What was made so far, outermost first: empty for a directory that exists, and after commit().
    [[nodiscard]] const std::vector<std::filesystem::path>& made() const noexcept { return made_; }

    /// Gives a new directory its name. `obsolete`: names of files that go as the new ones come, from a directory whose
    /// files are replaced together.
    void commit(const std::vector<std::string>& obsolete = {})
    {
        if (made_.empty()) { return; }
        if (staged_) {
            replace(obsolete);
            return;
        }
        auto named = target_; // after the rename nothing may fail, memory included
        std::vector<std::filesystem::path> above;
        for (const auto& level : made_) { above.push_back(detail::directory_of(level)); }
        if (detail::system::rename(path_, target_) != 0) {
            const int code = errno;
            if (code == ENOTEMPTY || code == EEXIST || code == ENOTDIR) {
                raise<io_error>(error_code::file_kind,
                    "was made by another program while this one worked, and is left as that made it; run again to "
                    "replace it, or choose another output",
                    target_.string(), code);
            }
            detail::raise_io(target_, "cannot give the finished directory its name", code);
        }
        path_.swap(named);
        for (const auto& level : made_) { detail::temporaries::drop(level); }
        made_.clear();
        // The name first, then those of the directories above that are new themselves.
        for (; mode_ == durability::synchronised && !above.empty(); above.pop_back()) {
            detail::synchronise_directory(above.back());
        }
    }

    /// The lock's file, while the directory is locked, for whoever must remove it when no destructor can run.
    [[nodiscard]] std::filesystem::path lock_file() const { return lock_ ? lock_->path() : std::filesystem::path(); }
    /// The lock on a directory that exists already; none otherwise.
    [[nodiscard]] directory_lock* lock() noexcept { return lock_ ? &*lock_ : nullptr; }

private:
    struct begun { };
    output_directory(begun, const std::filesystem::path& target, durability mode)
        : target_(target.has_filename() ? target : target.parent_path())
        , path_(target_)
        , mode_(mode)
    { }
    /// So that is_in_use() holds of the new directory.
    void lock_new() noexcept
    {
#if !defined(_WIN32) // where what is open keeps its name
        in_use_ = detail::descriptor(detail::system::open_to_read(path_));
        if (in_use_) { (void)detail::system::lock(in_use_.get()); }
#endif
    }
    /// A name that nothing has: what a killed run left may be called as this process would call its own, since
    /// containers number their processes alike.
    [[nodiscard]] std::filesystem::path sibling_name() const
    {
        static std::atomic<unsigned> counter{0};
        for (;;) {
            auto name = detail::directory_of(target_)
                / message(".taskvec-", detail::system::process(), "-directory-",
                    counter.fetch_add(1, std::memory_order_relaxed), ".tmp");
            detail::system::status there;
            if (!detail::system::look_at_link(name, there)) { return name; }
        }
    }
    /// A new directory for the new files: beside the one that exists, or within it where the two cannot be exchanged.
    /// It is made within and then moved, which a directory that is a mount of its own (a container's volume) refuses.
    void stage()
    {
        std::error_code failure;
        auto real = std::filesystem::canonical(target_, failure); // a link to a directory stays a link
        if (failure) { return; }
        const auto named = std::exchange(target_, std::move(real));
        for (const bool beside : {true, false}) {
            detail::system::status old, own;
            if (beside && !can_be_exchanged(old)) { continue; }
            auto sibling = sibling_name(), named_sibling = sibling;
            path_ = target_ / sibling.filename();
            made_.push_back(path_); // before there is something to remove
            bool fits = detail::system::make_directory(path_, false) == 0;
            if (fits && beside) {
                fits = detail::system::rename(path_, sibling) == 0;
                if (fits) {
                    made_.back().swap(sibling);
                    path_.swap(named_sibling);
                }
                fits = fits && detail::system::look_at(path_, own) && own.owner == old.owner && own.group == old.group
                    && detail::system::set_permissions(path_, old.mode & 07777) == 0;
            }
            if (fits) {
                detail::temporaries::add(path_);
                lock_new();
                staged_ = true;
                beside_ = beside;
                return;
            }
            detail::system::remove_directory(path_);
            made_.clear();
        }
        target_ = path_ = named;
    }
    [[nodiscard]] bool can_be_exchanged(detail::system::status& status) const
    {
        if (!detail::system::can_exchange) { return false; }
        detail::system::status above, here;
        if (target_ == target_.root_path() || !detail::system::look_at(target_, status)
            || !detail::system::look_at(target_.parent_path(), above) || status.device != above.device
            || !detail::system::may_fill(target_.parent_path())) {
            return false;
        }
        // Whoever works in it (the shell that started this process) would be left in a directory that is gone.
        if (detail::system::look_at(".", here) && here.device == status.device && here.inode == status.inode) {
            return false;
        }
        for (const auto& name : detail::names_in(target_)) {
            detail::system::status entry;
            if (!detail::system::look_at_link(target_ / name, entry) || !entry.is_file) { return false; }
        }
        return true;
    }
    /// Puts the new files in the place of the old ones.
    void replace(const std::vector<std::string>& obsolete)
    {
        const auto fresh = detail::names_in(path_);
        auto named = target_;
        for (const auto& name : fresh) { // each keeps the permissions of what it replaces
            detail::system::status old;
            if (!detail::system::look_at(target_ / name, old) || !old.is_file) { continue; }
            if (!detail::system::may_write(target_ / name)) {
                detail::raise_io(target_ / name, "exists and may not be written", errno);
            }
            (void)detail::system::set_permissions(path_ / name, old.mode & 0777);
        }
        if (beside_ && link_the_rest(obsolete) && take_place()) {
#if defined(TASKVEC_NO_EXCEPTIONS)
            bring_what_came(fresh, obsolete);
#else
            try {
                bring_what_came(fresh, obsolete);
            }
            catch (const std::bad_alloc&) { // the new files have their names: nothing may fail any more
            }
#endif
        }
        else {
            go_inside(fresh);
            move_in(fresh, obsolete);
        }
        discard(); // what lies under the temporary name is old by now
        path_.swap(named);
        staged_ = false;
    }
    /// Takes the new files into the old directory, where the next writer of it looks for what has gone aside.
    void go_inside(const std::vector<std::filesystem::path>& fresh)
    {
        if (!beside_) { return; }
        for (const auto& name : detail::names_in(path_)) {
            if (std::find(fresh.begin(), fresh.end(), name) == fresh.end()) {
                detail::system::remove_file(path_ / name);
            }
        }
        auto inner = target_ / path_.filename(), made = inner;
        if (detail::system::rename(path_, inner) != 0) {
            detail::raise_io(target_, "the finished files cannot be moved into it", errno);
        }
        detail::temporaries::drop(path_);
        detail::temporaries::add(inner);
        path_.swap(inner);
        made_.back().swap(made);
        beside_ = false;
    }
    /// Where the directories cannot be exchanged: the old files go aside, then the new ones take their names. The first
    /// to go and the last to come is the first one in the alphabet: an adapter has no configuration, and is read by
    /// nobody, while its weights change.
    void move_in(const std::vector<std::filesystem::path>& fresh, const std::vector<std::string>& obsolete) const
    {
        struct step {
            std::filesystem::path from, to;
        };
        std::vector<step> steps;
        const auto put_aside = [&](const std::filesystem::path& name) {
            detail::system::status old;
            if (detail::system::look_at_link(target_ / name, old)) {
                steps.push_back({target_ / name, (path_ / name) += detail::put_aside_ending});
            }
        };
        for (auto name = fresh.rbegin(); name != fresh.rend(); ++name) {
            const std::size_t before = steps.size();
            put_aside(*name);
            if (steps.size() != before) { continue; }
            // Nothing of this name is there to come back: whoever undoes the work removes the new file.
            const auto mark = (path_ / *name) += detail::was_not_there_ending;
            if (!detail::descriptor(detail::system::open_new(mark, false))) {
                detail::raise_io(target_, "a file cannot be created in it", errno);
            }
        }
        for (const auto& name : obsolete) { put_aside(name); }
        const std::size_t aside = steps.size();
        for (const auto& name : fresh) { steps.push_back({path_ / name, target_ / name}); }
        for (std::size_t i = 0; i < steps.size(); ++i) {
            if (i == 0 && mode_ == durability::synchronised) { detail::synchronise_directory(path_); }
            const bool ordered = i == 0 || i == aside || i + 1 == steps.size(); // also on the disk
            if (mode_ == durability::synchronised && ordered) { detail::synchronise_directory(target_); }
            if (detail::system::rename(steps[i].from, steps[i].to) == 0) { continue; }
            const int code = errno;
            while (i-- > 0) { detail::system::rename(steps[i].to, steps[i].from); }
            detail::raise_io(target_, "the finished files cannot take their names in it", code);
        }
        if (mode_ == durability::synchronised) { detail::synchronise_directory(target_); }
    }
    /// Gives all that is only in the old directory a name in the new one too; false where the system has no such links.
    [[nodiscard]] bool link_the_rest(const std::vector<std::string>& obsolete) const
    {
        const auto lock = lock_file().filename();
        for (const auto& name : detail::names_in(target_)) {
            if (std::find(obsolete.begin(), obsolete.end(), name) != obsolete.end()) { continue; }
            if (name != lock && detail::system::link(target_ / name, path_ / name) != 0 && errno != EEXIST) {
                return false;
            }
        }
        if (mode_ == durability::synchronised) { detail::synchronise_directory(path_); }
        return true;
    }
    /// False where the system cannot exchange the two.
    [[nodiscard]] bool take_place() const
    {
        const auto above = detail::directory_of(target_);
        if (detail::system::exchange(path_, target_) != 0) {
            const int code = errno;
            if (detail::system::is_no_exchange(code)) { return false; }
            detail::raise_io(target_, "cannot be exchanged with the finished directory", code);
        }
        if (mode_ == durability::synchronised) { detail::synchronise_directory(above); }
        return true;
    }
    /// Brings what others put into the old directory, which lies at path_ by now, after its names had been looked at.
    void bring_what_came(
        const std::vector<std::filesystem::path>& fresh, const std::vector<std::string>& obsolete) const
    {
        const auto lock = lock_file().filename();
        const auto is_one_of = [](const auto& names, const auto& name) {
            return std::find(names.begin(), names.end(), name) != names.end();
        };
        bool came = false;
        detail::system::for_each_name(path_, [&](auto text) {
            const std::filesystem::path name(text);
            if (name == lock || is_one_of(fresh, name) || is_one_of(obsolete, name)) { return; }
            detail::system::status old, now;
            const bool linked = detail::system::look_at_link(path_ / name, old)
                && detail::system::look_at_link(target_ / name, now) && old.device == now.device
                && old.inode == now.inode;
            if (!linked) { came = detail::system::rename(path_ / name, target_ / name) == 0 || came; }
        });
        if (came && mode_ == durability::synchronised) { detail::synchronise_directory(target_); }
    }
    void make(std::filesystem::path level)
    {
        if (detail::system::make_directory(level) == 0) {
            made_.push_back(std::move(level)); // there is room for it
            detail::temporaries::add(made_.back());
            return;
        }
        const int code = errno;
        discard();
        detail::raise_io(target_, message("cannot create the directory '", level.string(), "'"), code);
    }
    void discard() noexcept
    {
        if (!made_.empty() && made_.back() == path_) { detail::remove_tree(path_.c_str()); }
        for (; !made_.empty(); made_.pop_back()) {
            detail::temporaries::drop(made_.back());
            detail::system::remove_directory(made_.back());
        } // fails, as it should, where something else lies in it by now
    }

    std::filesystem::path target_, path_;
    durability mode_;
    std::vector<std::filesystem::path> made_;
    std::optional<directory_lock> lock_;
    detail::descriptor in_use_; ///< of the new directory
    bool staged_ = false; ///< what lies at path_ is to replace what lies at target_
    bool beside_ = false; ///< by an exchange of the two
};

/// Writes a whole text file atomically.
inline void write_text_file(
    const std::filesystem::path& path, std::string_view text, durability mode = durability::synchronised)
{
    atomic_file file(path, 0, mode);
    file.write(0, text.data(), text.size());
    file.commit();
}

/// A whole file as a string. Meant for small files: more than `limit` bytes is a format_error.
[[nodiscard]] inline std::string read_text_file(const std::filesystem::path& path, std::size_t limit = 100'000'000)
{
    const mapped_file file(path);
    const auto bytes = file.bytes();
    if (bytes.size() > limit) {
        raise<format_error>(error_code::file_too_large,
            message("has ", bytes.size(), " bytes; expected at most ", limit), path.string());
    }
    std::string text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    file.check_unchanged();
    return text;
}

} // namespace taskvec::inline TASKVEC_ABI
