// Memory maps and atomic files.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/formats/file.hpp>

#include "../skip.hpp"
#include "scratch.hpp"

#include <doctest/doctest.h>

#include <csignal>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <sys/resource.h>
#include <sys/wait.h>
#endif

using namespace taskvec;

TEST_CASE("a map shows the bytes of a file, and stays where it is when moved")
{
    const scratch folder;
    spill(folder / "f", "hello");
    mapped_file first(folder / "f");
    const auto* address = first.bytes().data();
    CHECK(std::string(reinterpret_cast<const char*>(address), first.bytes().size()) == "hello");
    mapped_file second(std::move(first));
    CHECK(second.bytes().data() == address);
    CHECK(first.bytes().empty());
#if !defined(_WIN32)
    second.advise(MADV_SEQUENTIAL);
#endif
    first = std::move(second);
    CHECK(first.bytes().data() == address);
    CHECK(first.path() == folder / "f");
}

TEST_CASE("an empty file maps to nothing; what is no regular file is refused")
{
    const scratch folder;
    spill(folder / "empty", "");
    const mapped_file nothing(folder / "empty");
    CHECK(nothing.bytes().empty());
    nothing.advise(0); // of nothing: no call
    CHECK_THROWS_AS(mapped_file(folder / "missing"), io_error);
    CHECK_THROWS_AS(mapped_file(folder.path()), io_error);
#if defined(_WIN32)
    CHECK_THROWS_AS(mapped_file("NUL"), io_error);
#else
    CHECK_THROWS_AS(mapped_file("/dev/null"), io_error);
    REQUIRE(::mkfifo((folder / "pipe").c_str(), 0600) == 0);
    CHECK_THROWS_AS(mapped_file(folder / "pipe"), io_error);
#endif
    try {
        mapped_file missing(folder / "missing");
    }
    catch (const io_error& failure) {
        CHECK(failure.system_code() == ENOENT);
        CHECK(failure.code() == error_code::file_not_found);
        CHECK(std::string(failure.what()).find("missing") != std::string::npos);
    }
}

TEST_CASE("a file that does not fit into the addresses of a 32-bit program is an error that says so")
{
    const scratch folder;
    spill(folder / "f", "x");
    std::filesystem::resize_file(folder / "f", 4'294'967'296 + 5); // a hole
    if constexpr (sizeof(std::size_t) == 8) {
        const mapped_file file(folder / "f");
        CHECK(file.bytes().size() == 4'294'967'301);
        CHECK(file.bytes()[4'294'967'300] == std::byte{0});
    }
    else {
        CHECK_THROWS_WITH_AS(mapped_file(folder / "f"),
            doctest::Contains("has 4294967301 bytes, more than a 32-bit program can map into memory"), io_error);
    }
}

TEST_CASE("an atomic file appears at commit and not before, and leaves nothing when it is dropped")
{
    const scratch folder;
    {
        atomic_file file(folder / "out", 6);
        file.write(3, "def", 3);
        file.write(0, "abc", 3);
        CHECK(folder.names().size() == 1);
        CHECK_FALSE(std::filesystem::exists(folder / "out"));
        CHECK(file.temporary().filename().string().starts_with(".taskvec-"));
        file.commit();
        CHECK(folder.names() == std::set<std::string>{"out"});
        CHECK(slurp(folder / "out") == "abcdef");
    }
    {
        atomic_file file(folder / "out", 2);
        file.write(0, "xy", 2);
    }
    CHECK(slurp(folder / "out") == "abcdef");
    CHECK(folder.names() == std::set<std::string>{"out"});
    {
        atomic_file first(folder / "moved", 1, durability::process);
        atomic_file second(std::move(first));
        second.write(0, "m", 1);
        second.commit();
    }
    CHECK(slurp(folder / "moved") == "m");
    CHECK(folder.names() == std::set<std::string>{"moved", "out"});
    {
        atomic_file first(folder / "dropped", 1), second(folder / "out", 1);
        first = std::move(second); // what it wrote before goes
        CHECK(folder.names().size() == 3);
        first.write(0, "z", 1);
        first.commit();
    }
    CHECK(slurp(folder / "out") == "z");
    CHECK(folder.names() == std::set<std::string>{"moved", "out"});
}

TEST_CASE("a finished file's bytes are taken as they are, on its own file system or another")
{
    const scratch folder;
    spill(folder / "done", "abc");
    {
        atomic_file file(folder / "out", 3);
        file.take(folder / "done");
        file.commit();
    }
    CHECK(slurp(folder / "out") == "abc");
    CHECK(slurp(folder / "done") == "abc");
    {
        atomic_file file(folder / "out", 3);
        CHECK_THROWS_WITH_AS(file.take(folder / "missing"), doctest::Contains("cannot take the bytes of '"), io_error);
    }
    CHECK(slurp(folder / "out") == "abc");
    CHECK(folder.names() == std::set<std::string>{"done", "out"});
#if defined(__linux__)
    const auto elsewhere = std::filesystem::path("/dev/shm") / message("taskvec-test-taken-", ::getpid());
    detail::system::status here, there;
    if (!detail::system::look_at(folder.path(), here) || !detail::system::look_at("/dev/shm", there)
        || here.device == there.device || ::access("/dev/shm", W_OK) != 0) {
        testing::skip("no file was taken from another file system: /dev/shm is none here");
        return;
    }
    spill(elsewhere, "from elsewhere");
    {
        atomic_file file(folder / "out", 3);
        file.take(elsewhere);
        file.commit();
    }
    std::filesystem::remove(elsewhere);
    CHECK(slurp(folder / "out") == "from elsewhere");
#endif
}

#if !defined(_WIN32)
TEST_CASE("memory of a file without a name is there, leaves nothing, and says why where it cannot be")
{
    const scratch folder;
    for (const auto& place : {folder.path(), std::filesystem::path()}) { // empty: here
        constexpr std::size_t bytes = 1 << 16;
        void* const memory = detail::map_unnamed_file(place, bytes, "tensors");
        std::memset(memory, 7, bytes);
        CHECK(static_cast<const unsigned char*>(memory)[bytes - 1] == 7);
        detail::system::unmap(memory, bytes);
    }
    CHECK(folder.names().empty());
    CHECK_THROWS_WITH_AS((void)detail::map_unnamed_file(folder / "missing", 4096, "tensors"),
        doctest::Contains("cannot create a temporary file in it"), io_error);
    CHECK_THROWS_WITH_AS((void)detail::map_unnamed_file(folder.path(), std::uint64_t{1} << 63, "tensors"),
        doctest::Contains("cannot reserve space for tensors"), io_error);
    CHECK(folder.names().empty());
}
#endif

TEST_CASE("what is removed in a hurry is a temporary name with all in it, and of others no more than a name")
{
    const scratch folder;
    std::filesystem::create_directories(folder / ".taskvec-1-directory-1.tmp/a/b");
    spill(folder / ".taskvec-1-directory-1.tmp/a/file", "x");
    std::filesystem::create_directories(folder / "made/with");
    std::filesystem::create_directory(folder / "empty");
    spill(folder / "file", "x");
    for (const char* name : {".taskvec-1-directory-1.tmp", "made", "empty", "file", "missing"}) {
        remove_temporary((folder / name).string().c_str());
    }
    CHECK(folder.names() == std::set<std::string>{"made"}); // which is not empty
    const auto before = std::filesystem::current_path();
    spill(folder / ".taskvec-1-1.tmp", "x");
    std::filesystem::current_path(folder.path());
    remove_temporary(".taskvec-1-1.tmp"); // a name without a directory
    std::filesystem::current_path(before);
    CHECK(folder.names() == std::set<std::string>{"made"});
}

#if !defined(_WIN32)
TEST_CASE("what a killed run put aside comes back, or is said not to, and a lock removes its own file alone")
{
    const scratch folder;
    const auto aside = ".taskvec-" + std::to_string(detail::system::process()) + "-directory-1.tmp";
    std::filesystem::create_directory(folder / aside);
    spill(folder / (aside + "/a.old"), "old");
    spill(folder / (aside + "/b"), "to come");
    std::filesystem::create_directories(folder / "a/inner"); // what has its name meanwhile
    {
        const directory_lock lock(folder.path());
        CHECK_THROWS_WITH_AS((void)finish_replacements(folder.path(), lock),
            doctest::Contains("cannot be given back what a killed run put aside"), io_error);
        CHECK(slurp(folder / (aside + "/a.old")) == "old");
        std::filesystem::remove_all(folder / "a");
        CHECK(finish_replacements(folder.path(), lock) == std::vector<std::string>{"a"});
    }
    CHECK(slurp(folder / "a") == "old");
    CHECK(folder.names() == std::set<std::string>{"a"});
    {
        const directory_lock lock(folder.path());
        std::filesystem::remove(folder / ".taskvec-lock");
        spill(folder / ".taskvec-lock", "of somebody else");
    }
    CHECK(slurp(folder / ".taskvec-lock") == "of somebody else");
    const directory_lock none;
    CHECK_THROWS_WITH_AS((void)finish_replacements(folder / "missing", none),
        doctest::Contains("cannot be read as a directory"), io_error);
}
#endif

TEST_CASE("names that look like temporary ones are left alone")
{
    const scratch folder;
    const auto own = std::to_string(detail::system::process());
    for (const auto& name : {std::string(".taskvec-1x.tmp"), std::string(".taskvec-.tmp"),
             std::string(".taskvec-99999999999999999999-1.tmp"), std::string(".taskvec--1-1.tmp"),
             std::string("taskvec-1-1.tmp"), std::string(".taskvec-1-1"), ".taskvec-" + own + "-1.tmp"}) {
        CAPTURE(name);
        CHECK_FALSE(is_left_over(name));
    }
    const auto file = ".taskvec-" + own + "-directory-1.tmp", other = ".taskvec-" + own + "-1.tmp";
    spill(folder / file, "a file, and no directory of old ones");
    std::filesystem::create_directory(folder / other);
    const directory_lock lock(folder.path());
    CHECK(finish_replacements(folder.path(), lock).empty());
    CHECK(folder.names() == std::set<std::string>{".taskvec-lock", file, other});
}

#if !defined(_WIN32)
TEST_CASE("permissions: a replaced file keeps its own, a new one follows the umask")
{
    const scratch folder;
    const auto mode = [&](const char* name) {
        struct stat status{};
        ::stat((folder / name).c_str(), &status);
        return status.st_mode & 0777;
    };
    const auto old = ::umask(027);
    write_text_file(folder / "new", "x");
    ::umask(old);
    CHECK(mode("new") == 0640);
    ::chmod((folder / "new").c_str(), 0604);
    write_text_file(folder / "new", "y");
    CHECK(mode("new") == 0604);
    CHECK(slurp(folder / "new") == "y");
}
#endif

#if !defined(_WIN32)
TEST_CASE("a symbolic link is replaced, what it points to is not touched")
{
    const scratch folder;
    spill(folder / "blob", "old");
    std::filesystem::create_symlink("blob", folder / "link");
    write_text_file(folder / "link", "new");
    CHECK(slurp(folder / "blob") == "old");
    CHECK(slurp(folder / "link") == "new");
    CHECK_FALSE(std::filesystem::is_symlink(folder / "link"));
}
#endif

TEST_CASE("targets that cannot be written are refused before anything appears")
{
    const scratch folder;
    CHECK_THROWS_AS(atomic_file(folder / "no/such/folder"), io_error);
    CHECK_THROWS_AS(atomic_file(folder.path()), io_error);
#if !defined(_WIN32)
    CHECK_THROWS_AS(atomic_file("/dev/null"), io_error);
#endif
    CHECK_THROWS_AS(atomic_file(folder.path().string() + "/"), io_error);
    CHECK(folder.names().empty());
}

#if !defined(_WIN32)
TEST_CASE("a file too large for the disk or the process's limit is an error and leaves nothing")
{
    const scratch folder;
    spill(folder / "out", "old");
    rlimit old{};
    ::getrlimit(RLIMIT_FSIZE, &old);
    const auto handler = std::signal(SIGXFSZ, SIG_IGN);
    rlimit tight = old;
    tight.rlim_cur = 1000;
    ::setrlimit(RLIMIT_FSIZE, &tight);
    CHECK_THROWS_AS(atomic_file(folder / "out", 2000), io_error);
    {
        atomic_file file(folder / "out", 500);
        const std::vector<char> data(2000);
        CHECK_THROWS_AS(file.write(0, data.data(), data.size()), io_error);
    }
    ::setrlimit(RLIMIT_FSIZE, &old);
    std::signal(SIGXFSZ, handler);
    CHECK(slurp(folder / "out") == "old");
    CHECK(folder.names() == std::set<std::string>{"out"});
}
#endif

#if defined(__linux__)
TEST_CASE("a file in memory takes its space as it is written; one that does not fit is an error before that")
{
    struct statfs system{};
    if (::statfs("/dev/shm", &system) != 0 || static_cast<std::uint64_t>(system.f_type) != TMPFS_MAGIC
        || system.f_blocks == 0 || ::access("/dev/shm", W_OK) != 0) {
        testing::skip("no file was made in memory: /dev/shm is no file system of limited size in memory here");
        return;
    }
    const auto target = std::filesystem::path("/dev/shm") / message("taskvec-test-", ::getpid());
    const std::uint64_t all = std::uint64_t{system.f_blocks} * static_cast<std::uint64_t>(system.f_bsize);
    CHECK_THROWS_AS(atomic_file(target, 2 * all), io_error);
    {
        atomic_file file(target, 1 << 23);
        file.write(5, "word", 4);
        file.commit();
    }
    struct stat status{};
    REQUIRE(::stat(target.c_str(), &status) == 0);
    CHECK(status.st_size == 1 << 23);
    CHECK(status.st_blocks * 512 < 1 << 23); // what was written, not all
    CHECK(slurp(target).substr(4, 6) == std::string("\0word\0", 6));
    std::filesystem::remove(target);
}
#endif

#if !defined(_WIN32)
TEST_CASE("a process killed while it writes leaves the old file")
{
    const scratch folder;
    spill(folder / "out", "old");
    const pid_t child = ::fork();
    if (child == 0) {
        atomic_file file(folder / "out", 1 << 20);
        const std::vector<char> data(1 << 19, 'n');
        file.write(0, data.data(), data.size());
        ::raise(SIGKILL);
    }
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    REQUIRE(WIFSIGNALED(status));
    CHECK(slurp(folder / "out") == "old");
    for (const auto& name : folder.names()) { CHECK((name == "out" || name.starts_with(".taskvec-"))); }
    write_text_file(folder / "out", "new"); // what the killed process left is in nobody's way
    CHECK(slurp(folder / "out") == "new");
}
#endif

TEST_CASE("threads may write ranges of one file at once")
{
    const scratch folder;
    atomic_file file(folder / "out", 4000);
    {
        std::vector<std::jthread> threads;
        for (int t = 0; t < 4; ++t) {
            threads.emplace_back([&file, t] {
                const std::string piece(10, static_cast<char>('a' + t));
                for (int i = t; i < 400; i += 4) { file.write(static_cast<std::uint64_t>(10 * i), piece.data(), 10); }
            });
        }
    }
    file.commit();
    const auto content = slurp(folder / "out");
    REQUIRE(content.size() == 4000);
    for (std::size_t i = 0; i < 4000; ++i) { REQUIRE(content[i] == static_cast<char>('a' + i / 10 % 4)); }
}

TEST_CASE("reading a text file stops at its limit")
{
    const scratch folder;
    spill(folder / "f", "12345");
    CHECK(read_text_file(folder / "f") == "12345");
    CHECK_THROWS_AS((void)read_text_file(folder / "f", 4), format_error);
}

TEST_CASE("a new directory appears whole or not at all, with those above it")
{
    const scratch folder;
    {
        output_directory directory(folder / "a/b/c");
        CHECK(directory.path().filename().string().starts_with(".taskvec-"));
        CHECK(directory.made().size() == 3);
        write_text_file(directory.path() / "file", "x");
        CHECK_FALSE(std::filesystem::exists(folder / "a/b/c"));
        directory.commit();
        CHECK(directory.path() == folder / "a/b/c");
    }
    CHECK(slurp(folder / "a/b/c/file") == "x");
    CHECK(scratch::names_in(folder / "a/b") == std::set<std::string>{"c"});
    {
        output_directory directory(folder / "d/e/");
        write_text_file(directory.path() / "file", "x");
    }
    CHECK(folder.names() == std::set<std::string>{"a"});
    {
        output_directory directory(folder / "a/b/c"); // it is there: files are written where they belong
        CHECK(directory.path() == folder / "a/b/c");
        CHECK(directory.made().empty());
    }
    CHECK(slurp(folder / "a/b/c/file") == "x");
    CHECK_THROWS_AS(output_directory(folder / "a/b/c/file"), io_error);
    CHECK_THROWS_AS(output_directory(folder / "a/b/c/file/d"), io_error);
    output_directory late(folder / "taken");
    std::filesystem::create_directory(folder / "taken");
    spill(folder / "taken/other", "y");
    CHECK_THROWS_WITH_AS(
        late.commit(), doctest::Contains("was made by another program while this one worked"), io_error);
    CHECK(slurp(folder / "taken/other") == "y");
#if !defined(_WIN32)
    output_directory later(folder / "file");
    spill(folder / "file", "z");
    CHECK_THROWS_WITH_AS(
        later.commit(), doctest::Contains("was made by another program while this one worked"), io_error);
    CHECK(slurp(folder / "file") == "z");
#endif
}

#if !defined(_WIN32)
TEST_CASE("copying from a map whose file was cut short is an error that says so")
{
    const scratch folder;
    spill(folder / "in", std::string(1 << 16, 'x'));
    const mapped_file map(folder / "in");
    std::filesystem::resize_file(folder / "in", 0);
    atomic_file out(folder / "out", 1 << 16);
    std::string found;
    try {
        out.write(0, map.bytes().data(), map.bytes().size());
    }
    catch (const io_error& failure) {
        found = failure.what();
    }
    CHECK(found.find("shrank") != std::string::npos);
}
#endif

TEST_CASE("what a holder noted in its lock is there for who takes it over")
{
    const scratch folder;
    {
        directory_lock first(folder.path());
        CHECK(first.noted().empty());
        first.note("longer than the next\n");
        first.note(std::string(5000, 'x'));
        first.keep(); // as when it is killed
    }
    CHECK(folder.names() == std::set<std::string>{".taskvec-lock"});
    CHECK(directory_lock(folder.path()).noted() == std::string(5000, 'x'));
    CHECK(folder.names().empty());
    directory_lock none(folder / "missing"); // what is wrong is found when files are made in it
    CHECK(none.path().empty());
    none.note("nobody reads this");
    CHECK(none.noted().empty());
}

TEST_CASE("a file that is closed for a while goes on where it was")
{
    const scratch folder;
    atomic_file file(folder / "out", 6);
    file.write(0, "abc", 3);
    file.close_for_now();
    file.open_again();
    file.write(3, "def", 3);
    file.close_for_now();
    file.finish();
    file.commit();
    CHECK(slurp(folder / "out") == "abcdef");
}

TEST_CASE("a directory that is dropped goes with all that was put into it")
{
    const scratch folder;
    {
        const output_directory out(folder / "new/out");
        std::filesystem::create_directories(out.path() / "a/b");
        for (int i = 0; i < 300; ++i) { spill(out.path() / ("a/" + std::string(200, 'x') + std::to_string(i)), "x"); }
#if !defined(_WIN32)
        std::filesystem::create_directory_symlink(folder.path(), out.path() / "link");
#endif
        spill(folder / "kept", "kept");
    }
    CHECK(folder.names() == std::set<std::string>{"kept"});
}

TEST_CASE("a directory that is exchanged has its new files all at once, and keeps the others")
{
    const scratch folder;
    std::filesystem::create_directory(folder / "out");
    spill(folder / "out/a", "old a");
    spill(folder / "out/b", "old b");
    spill(folder / "out/kept", "kept");
    std::filesystem::permissions(
        folder / "out/a", std::filesystem::perms::owner_read | std::filesystem::perms::owner_write);
    {
        output_directory out(folder / "out", durability::synchronised, existing_directory::exchange);
        write_text_file(out.path() / "a", "new a");
        CHECK(slurp(folder / "out/a") == "old a");
        CHECK(slurp(folder / "out/b") == "old b");
    } // not committed
    CHECK(folder.names() == std::set<std::string>{"out"});
    CHECK(slurp(folder / "out/a") == "old a");
    {
        output_directory out(folder / "out", durability::synchronised, existing_directory::exchange);
        write_text_file(out.path() / "a", "new a");
        write_text_file(out.path() / "b", "new b");
        out.commit();
        CHECK(slurp(folder / "out/a") == "new a");
        CHECK(slurp(folder / "out/b") == "new b");
    }
    CHECK(slurp(folder / "out/kept") == "kept");
#if !defined(_WIN32)
    CHECK(std::filesystem::status(folder / "out/a").permissions()
        == (std::filesystem::perms::owner_read | std::filesystem::perms::owner_write));
#endif
    CHECK(scratch::names_in(folder / "out") == std::set<std::string>{"a", "b", "kept"});
    CHECK(folder.names() == std::set<std::string>{"out"});

    std::filesystem::create_directory(folder / "out/inner"); // cannot be linked: files take their names one by one
    {
        output_directory out(folder / "out", durability::synchronised, existing_directory::exchange);
        CHECK(out.path().parent_path() == folder / "out");
        write_text_file(out.path() / "a", "newer a");
        CHECK(slurp(folder / "out/a") == "new a");
        out.commit();
    }
    CHECK(slurp(folder / "out/a") == "newer a");
    CHECK(scratch::names_in(folder / "out") == std::set<std::string>{"a", "b", "inner", "kept"});
    {
        output_directory out(folder / "out", durability::process, existing_directory::exchange);
        write_text_file(out.path() / "a", "newest a");
        write_text_file(out.path() / "new", "new");
        out.commit();
    }
    CHECK(slurp(folder / "out/a") == "newest a");
    CHECK(scratch::names_in(folder / "out") == std::set<std::string>{"a", "b", "inner", "kept", "new"});
}

TEST_CASE("what a killed process of the same number left is in nobody's way")
{
    const scratch folder;
    std::filesystem::create_directory(folder / "out");
    const auto number = std::to_string(detail::system::process());
    for (int i = 0; i < 200; ++i) { // more than this program has counted so far
        std::filesystem::create_directory(folder / (".taskvec-" + number + "-directory-" + std::to_string(i) + ".tmp"));
    }
    const auto before = folder.names();
    for (const auto* name : {"out", "new"}) {
        output_directory out(folder / name, durability::process, existing_directory::exchange);
        CHECK_FALSE(before.contains(out.path().filename().string()));
        write_text_file(out.path() / "a", "a");
        out.commit();
        CHECK(slurp(folder / name / "a") == "a");
    }
    auto after = folder.names();
    after.erase("new");
    CHECK(after == before);
}

#if !defined(_WIN32)
TEST_CASE("what is being written is known to be in use, and is not once it is finished or dropped")
{
    const scratch folder;
    {
        atomic_file file(folder / "a", 3);
        CHECK(is_in_use(file.temporary()));
        file.write(0, "abc", 3);
        file.close_for_now();
        file.open_again();
        CHECK(is_in_use(file.temporary()));
        file.commit();
        CHECK_FALSE(is_in_use(folder / "a"));
    }
    std::filesystem::create_directory(folder / "old");
    for (const auto* name : {"new", "old"}) {
        output_directory out(folder / name, durability::process, existing_directory::exchange);
        CHECK(is_in_use(out.path()));
        out.commit();
    }
    CHECK_FALSE(is_in_use(folder / "new"));
    CHECK_FALSE(is_in_use(folder / "old"));
    CHECK_FALSE(is_in_use(folder / "missing"));
}
#endif

TEST_CASE("one writer at a time has a directory; a dead one's lock is taken over")
{
    const scratch folder;
    {
        const directory_lock first(folder.path());
        CHECK(first.path() == folder / ".taskvec-lock");
        CHECK_THROWS_WITH_AS(directory_lock(folder.path()), doctest::Contains("another process"), io_error);
        CHECK_THROWS_AS(output_directory(folder.path()), io_error);
    }
    CHECK(folder.names().empty());
#if defined(_WIN32)
    spill(folder / ".taskvec-lock", "");
#else
    const pid_t child = ::fork();
    if (child == 0) {
        const directory_lock held(folder.path());
        ::_exit(0); // as when it is killed: the file stays
    }
    ::waitpid(child, nullptr, 0);
#endif
    CHECK(folder.names() == std::set<std::string>{".taskvec-lock"});
    {
        const directory_lock next(folder.path());
        CHECK(!next.path().empty());
    }
    CHECK(folder.names().empty());
}

#if !defined(_WIN32)
TEST_CASE("a file that is written to, cut, replaced or removed while it is mapped is found out")
{
    const scratch folder;
    const auto path = folder / "in";
    const auto change = [&](auto&& how) {
        spill(path, "0123456789");
        const mapped_file map(path);
        map.check_unchanged();
        how();
        CHECK_THROWS_WITH_AS(map.check_unchanged(), doctest::Contains("changed while it was being read"), io_error);
    };
    change([&] { std::filesystem::resize_file(path, 9); });
    change([&] { std::filesystem::remove(path); });
    change([&] { write_text_file(path, "0123456789"); });
    change([&] {
        ::usleep(20'000); // times are those of the system's clock tick
        spill(path, "9876543210");
    });
    spill(path, "0123456789");
    mapped_file moved;
    {
        mapped_file map(path);
        moved = std::move(map);
    }
    moved.check_unchanged();
    CHECK(moved.opened().size == 10);
}
#endif

TEST_CASE("names are UTF-8 on every system")
{
    const scratch folder;
    const std::filesystem::path name = u8"Ünïcødé 名前";
    write_text_file(folder.path() / name, "text");
    CHECK(read_text_file(folder.path() / name) == "text");
    const auto names = detail::names_in(folder.path());
    REQUIRE(names.size() == 1);
    CHECK(detail::name_text(names[0]) == reinterpret_cast<const char*>(u8"Ünïcødé 名前"));
    CHECK(detail::path_of(detail::name_text(names[0])) == name);
    try {
        write_text_file(folder.path() / name / "x", "y");
        FAIL("a file is no directory");
    }
    catch (const io_error& failure) {
        CHECK(std::string(failure.what()).find(reinterpret_cast<const char*>(u8"Ünïcødé 名前")) != std::string::npos);
    }
}

#if defined(_WIN32)
// What another process does until it is killed: this program again, with TASKVEC_TEST_HOLD.
TEST_CASE("holds a directory" * doctest::skip())
{
    const char* const named = std::getenv("TASKVEC_TEST_HOLD");
    REQUIRE(named);
    const std::filesystem::path folder = named;
    directory_lock held(folder);
    held.note("noted");
    atomic_file file(folder / "out", 1 << 20);
    const std::vector<char> data(1 << 19, 'n');
    file.write(0, data.data(), data.size());
    spill(folder / "ready", "");
    ::Sleep(60'000);
}

TEST_CASE("a process that is killed leaves the old file, and its lock ends with it")
{
    const scratch folder;
    spill(folder / "out", "old");
    ::SetEnvironmentVariableW(L"TASKVEC_TEST_HOLD", folder.path().c_str());
    wchar_t self[MAX_PATH]{};
    ::GetModuleFileNameW(nullptr, self, MAX_PATH);
    std::wstring command = L"\"" + std::wstring(self) + L"\" --no-skip --test-case=\"holds a directory\"";
    STARTUPINFOW how{};
    how.cb = sizeof how;
    PROCESS_INFORMATION child{};
    REQUIRE(::CreateProcessW(nullptr, command.data(), nullptr, nullptr, FALSE, 0, nullptr, nullptr, &how, &child));
    for (int i = 0; i < 600 && !std::filesystem::exists(folder / "ready"); ++i) { ::Sleep(50); }
    REQUIRE(std::filesystem::exists(folder / "ready"));
    CHECK_THROWS_WITH_AS(directory_lock(folder.path()), doctest::Contains("another process"), io_error);
    std::string temporary;
    for (const auto& name : folder.names()) {
        if (name.ends_with(".tmp")) { temporary = name; }
    }
    REQUIRE(!temporary.empty());
    CHECK_FALSE(is_left_over(temporary));
    ::TerminateProcess(child.hProcess, 1);
    ::WaitForSingleObject(child.hProcess, INFINITE);
    ::CloseHandle(child.hThread);
    ::CloseHandle(child.hProcess);
    CHECK(is_left_over(temporary));
    CHECK(slurp(folder / "out") == "old");
    const directory_lock next(folder.path());
    CHECK(!next.path().empty());
    CHECK(next.noted() == "noted");
    write_text_file(folder / "out", "new");
    CHECK(slurp(folder / "out") == "new");
}
#endif

#if defined(_WIN32)
TEST_CASE("what is of POSIX alone")
{
    testing::skip("permissions, symbolic links, limits of files, killed writers, and maps that are cut short or "
                  "changed: Windows has no umask, setrlimit, fork or truncation of mapped files");
}
#endif
