// PyTorch files (pytorch_model.bin, .pt, .pth), read without Python: a zip archive with a pickle that builds tensors,
// and nothing else. No code runs. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/by_name.hpp>
#include <taskvec/core/dtype.hpp>
#include <taskvec/core/error.hpp>
#include <taskvec/core/tensor_ref.hpp>
#include <taskvec/formats/file.hpp>
#include <taskvec/formats/file_kind.hpp>
#include <taskvec/formats/safetensors.hpp>
#include <taskvec/formats/system.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The largest pickle that is read; tensors' bytes lie beside it.
inline constexpr std::size_t pickle_size_limit = 100'000'000;
/// The most values that a pickle may build: room for 200,000 tensors.
inline constexpr std::size_t pickle_value_limit = 5'000'000;
/// The most bytes, laid out, of a file's tensors that have more elements than their storage (expanded views).
inline constexpr std::uint64_t expanded_bytes_limit = std::uint64_t{1} << 30;

/// What a PyTorch file holds, in the terms of a safetensors header: tensors are ranges of the file's bytes (ranges may
/// be equal: tied weights).
struct pytorch_contents {
    safetensors_header header; ///< names, dtypes, shapes and places of the tensors
    std::vector<std::string> notes{}; ///< what whoever opens it should know
    /// Strides, in elements, of tensors that do not lie row-major in their bytes (transposed, parts of others, or
    /// expanded, whose elements share bytes): lay_out_rows() gives them rows. Every element lies in the file, from the
    /// entry's offset on; the entry's size is that of the rows.
    std::map<std::string, extents> strides{};
};

namespace detail {

/// A zip archive's directory, each entry checked: where its bytes lie, stored as they are.
class zip_directory {
public:
    struct entry {
        std::string_view name;
        std::uint64_t offset = 0, size = 0;
        bool stored = true; ///< neither compressed nor encrypted
    };

    zip_directory(std::string_view bytes, std::string_view file)
        : bytes_(bytes)
        , file_(file)
    {
        read();
    }
    [[nodiscard]] const std::vector<entry>& entries() const noexcept { return entries_; }
    /// The entry of that name, or nullptr.
    [[nodiscard]] const entry* find(std::string_view name) const { return detail::find_by_name(entries_, name); }
    [[nodiscard]] std::string_view content(const entry& one) const
    {
        return bytes_.substr(static_cast<std::size_t>(one.offset), static_cast<std::size_t>(one.size));
    }

private:
    [[noreturn]] void fail(const std::string& what, std::uint64_t at) const
    {
        raise<format_error>(error_code::archive_damaged,
            message("is a damaged PyTorch file (a zip archive): ", what, ": ", fetch_again), std::string(file_), at);
    }
    /// A little-endian number; the place must lie inside the file.
    template <class T>
    [[nodiscard]] T number(std::uint64_t at) const
    {
        if (at > bytes_.size() || bytes_.size() - at < sizeof(T)) { fail("a record runs past its end", at); }
        T value;
        std::memcpy(&value, bytes_.data() + at, sizeof value);
        return value;
    }
    [[nodiscard]] std::string_view text(std::uint64_t at, std::uint64_t size) const
    {
        if (at > bytes_.size() || bytes_.size() - at < size) { fail("a record runs past its end", at); }
        return bytes_.substr(static_cast<std::size_t>(at), static_cast<std::size_t>(size));
    }

    void read()
    {
        constexpr std::uint32_t end_mark = 0x06054b50, end64_mark = 0x06064b50, locator_mark = 0x07064b50,
                                entry_mark = 0x02014b50;
        constexpr std::uint64_t end_size = 22, locator_size = 20;
        std::uint64_t end = bytes_.size();
        for (std::uint64_t comment = 0; comment <= 65535 && comment + end_size <= bytes_.size(); ++comment) {
            const std::uint64_t at = bytes_.size() - end_size - comment;
            if (number<std::uint32_t>(at) == end_mark && number<std::uint16_t>(at + 20) == comment) {
                end = at;
                break;
            }
        }
        if (end == bytes_.size()) { fail("its directory, at its end, is missing", end); }
        std::uint64_t count = number<std::uint16_t>(end + 10), size = number<std::uint32_t>(end + 12),
                      begin = number<std::uint32_t>(end + 16), limit = end;
        if (end >= locator_size && number<std::uint32_t>(end - locator_size) == locator_mark) {
            const auto at = number<std::uint64_t>(end - locator_size + 8);
            if (number<std::uint32_t>(at) != end64_mark) { fail("its 64-bit directory is not where it should be", at); }
            count = number<std::uint64_t>(at + 32);
            size = number<std::uint64_t>(at + 40);
            begin = number<std::uint64_t>(at + 48);
            limit = at;
        }
        if (begin > limit || size > limit - begin) { fail("its directory runs past its end", begin); }
        std::uint64_t at = begin;
        for (std::uint64_t i = 0; i < count; ++i) {
            if (begin + size - at < 46 || number<std::uint32_t>(at) != entry_mark) {
                fail(message("its directory promises ", count, " entries and has ", i), at);
            }
            at = read_entry(at, begin);
            if (at > begin + size) { fail("its directory runs past its end", at); }
        }
        std::sort(entries_.begin(), entries_.end(), [](const entry& a, const entry& b) { return a.name < b.name; });
        for (std::size_t i = 1; i < entries_.size(); ++i) {
            if (entries_[i].name == entries_[i - 1].name) {
                fail(message("'", entries_[i].name, "' occurs twice"), entries_[i].offset);
            }
        }
        auto places = entries_;
        std::sort(places.begin(), places.end(), [](const entry& a, const entry& b) { return a.offset < b.offset; });
        for (std::size_t i = 1; i < places.size(); ++i) {
            if (places[i - 1].size > places[i].offset - places[i - 1].offset) {
                fail(message("'", places[i - 1].name, "' and '", places[i].name, "' share bytes"), places[i].offset);
            }
        }
    }
    /// Reads the entry of the directory at `at`; returns where the next one begins. Entries lie before `begin`.
    [[nodiscard]] std::uint64_t read_entry(std::uint64_t at, std::uint64_t begin)
    {
        constexpr std::uint32_t local_mark = 0x04034b50, wide = 0xffffffff;
        const auto flags = number<std::uint16_t>(at + 8), method = number<std::uint16_t>(at + 10);
        const std::uint64_t name_size = number<std::uint16_t>(at + 28), extra_size = number<std::uint16_t>(at + 30),
                            comment_size = number<std::uint16_t>(at + 32);
        std::uint64_t packed = number<std::uint32_t>(at + 20), size = number<std::uint32_t>(at + 24),
                      local = number<std::uint32_t>(at + 42);
        entry one;
        one.name = text(at + 46, name_size);
        const std::uint64_t extra_end = at + 46 + name_size + extra_size;
        (void)text(at + 46 + name_size, extra_size);
        for (std::uint64_t field = at + 46 + name_size; extra_end - field >= 4;) {
            const auto id = number<std::uint16_t>(field), length = number<std::uint16_t>(field + 2);
            if (length > extra_end - field - 4) { break; }
            std::uint64_t place = field + 4;
            const std::uint64_t field_end = place + length;
            for (auto* value : {&size, &packed, &local}) {
                if (id == 1 && *value == wide && field_end - place >= 8) {
                    *value = number<std::uint64_t>(place);
                    place += 8;
                }
            }
            field = field_end;
        }
        if (local > begin || begin - local < 30 || number<std::uint32_t>(local) != local_mark) {
            fail(message("'", one.name, "' is not where the directory says"), local);
        }
        const std::uint64_t here = number<std::uint16_t>(local + 26);
        one.offset = local + 30 + here + number<std::uint16_t>(local + 28);
        if (here != name_size || text(local + 30, here) != one.name) {
            fail(message("'", one.name, "' has another name where it lies"), local);
        }
        one.stored = method == 0 && (flags & 1u) == 0;
        one.size = one.stored ? size : packed;
        if (one.stored && packed != size) { fail(message("'", one.name, "' has two sizes"), at); }
        if (one.offset > begin || one.size > begin - one.offset) {
            fail(message("'", one.name, "' runs past the end"), one.offset);
        }
        entries_.push_back(one);
        return extra_end + comment_size;
    }

    std::string_view bytes_, file_;
    std::vector<entry> entries_;
};

/// The machine of a pickle, with the instructions that build numbers, strings, lists, tuples, dictionaries and tensors.
/// Whatever else is named, called or built stays a name (`opaque`): nothing of it is known but what it was given.
/// Values lie in one list and refer to each other by place: nothing recurses, whatever is nested.
class pickle_reader {
public:
    using index = std::uint32_t;
    enum class kind : std::uint8_t {
        none,
        number,
        text,
        list,
        tuple,
        dictionary,
        global,
        storage,
        tensor,
        other,
        opaque
    };
    struct value {
        kind what = kind::none;
        bool truth = false; ///< of numbers: True or False
        taskvec::dtype type = taskvec::dtype::f32; ///< of storages and tensors
        std::int64_t number = 0; ///< a number; of storages how many elements, of tensors the first one's place
        std::string_view text{}; ///< a text; a global's name; of storages the entry's key; of the opaque what named it
        /// Of dictionaries keys and values in turn; of tensors the storage, sizes, strides, and what else was said of
        /// it.
        std::vector<index> items{};
    };

    pickle_reader(std::string_view code, std::string_view file)
        : code_(code)
        , file_(file)
    { }
    /// Runs it; the value that it leaves.
    [[nodiscard]] const value& run()
    {
        for (;;) {
            const auto operation = static_cast<unsigned char>(take(1)[0]);
            if (operation == '.') {
                if (!marks_.empty() || stack_.size() != 1) { damaged("leaves no single value"); }
                find_given();
                return values_[stack_.back()];
            }
            step(operation);
        }
    }
    [[nodiscard]] const value& at(index place) const { return values_[place]; }
    /// Whether something opaque was given this value, itself or in others: what it is in the end is not known.
    [[nodiscard]] bool was_given(const value& one) const
    {
        return !reached_.empty() && reached_[static_cast<std::size_t>(&one - values_.data())];
    }
    /// The first name that is none of tensors, in quotes; empty where all are.
    [[nodiscard]] const std::string& first_opaque() const { return first_opaque_; }
    [[noreturn]] void refuse_opaque(std::string_view what) const
    {
        refuse(message(what.starts_with('\'') ? "names " : "builds ", what));
    }

    [[noreturn]] void refuse(const std::string& what) const
    {
        raise<format_error>(error_code::pickle_unsupported,
            message("is a PyTorch file whose pickle ", what,
                ", and builds more than tensors; nothing of it was run: convert it once by transformers' "
                "save_pretrained(), or save the state_dict alone where it was made; torch.load(FILE, "
                "weights_only=True) may refuse it too, and weights_only=False runs what it names: for files that you "
                "trust"),
            std::string(file_), place_);
    }
    [[noreturn]] void damaged(const std::string& what) const
    {
        raise<format_error>(error_code::archive_damaged,
            message("is a damaged PyTorch file: its pickle ", what, ": ", fetch_again), std::string(file_), place_);
    }

private:
    [[nodiscard]] std::string_view take(std::uint64_t size)
    {
        if (size > code_.size() - place_) { damaged("is cut short"); }
        const auto part = code_.substr(place_, static_cast<std::size_t>(size));
        place_ += static_cast<std::size_t>(size);
        return part;
    }
    template <class T>
    [[nodiscard]] T take_number()
    {
        T number;
        std::memcpy(&number, take(sizeof(T)).data(), sizeof(T));
        return number;
    }
    [[nodiscard]] std::string_view take_line()
    {
        const auto end = code_.find('\n', place_);
        if (end == code_.npos) { damaged("is cut short"); }
        const auto line = code_.substr(place_, end - place_);
        place_ = end + 1;
        return line;
    }
    void push(value one)
    {
        if (values_.size() >= pickle_value_limit) {
            refuse(message("builds more than ", pickle_value_limit, " values"));
        }
        values_.push_back(std::move(one));
        stack_.push_back(static_cast<index>(values_.size() - 1));
    }
    void push_number(std::int64_t number, bool truth = false) { push({kind::number, truth, {}, number, {}, {}}); }
    [[nodiscard]] index pop()
    {
        if (stack_.size() <= (marks_.empty() ? 0 : marks_.back())) { damaged("takes more values than it has"); }
        const index top = stack_.back();
        stack_.pop_back();
        return top;
    }
    [[nodiscard]] std::vector<index> pop_to_mark()
    {
        if (marks_.empty()) { damaged("has no mark where it takes one"); }
        const auto first = stack_.begin() + static_cast<std::ptrdiff_t>(marks_.back());
        std::vector<index> items(first, stack_.end());
        stack_.erase(first, stack_.end());
        marks_.pop_back();
        return items;
    }
    [[nodiscard]] value& top()
    {
        if (stack_.size() <= (marks_.empty() ? 0 : marks_.back())) { damaged("takes more values than it has"); }
        return values_[stack_.back()];
    }
    void put(std::uint64_t slot)
    {
        (void)top();
        memo_[slot] = stack_.back();
    }
    void get(std::uint64_t slot)
    {
        const auto place = memo_.find(slot);
        if (place == memo_.end()) { damaged("asks for a value that it never kept"); }
        stack_.push_back(place->second);
        if (stack_.size() > pickle_value_limit) { refuse("holds too many values at once"); }
    }
    void push_tuple(std::size_t size)
    {
        value tuple{kind::tuple, false, {}, 0, {}, std::vector<index>(size)};
        while (size > 0) { tuple.items[--size] = pop(); }
        push(std::move(tuple));
    }
    void push_opaque(std::string_view name) { push({kind::opaque, false, {}, 0, name, {}}); }
    /// Marks what opaque values were given, and all that this holds.
    void find_given()
    {
        if (given_.empty()) { return; }
        reached_.assign(values_.size(), false);
        while (!given_.empty()) {
            const index one = given_.back();
            given_.pop_back();
            if (reached_[one]) { continue; }
            reached_[one] = true;
            given_.insert(given_.end(), values_[one].items.begin(), values_[one].items.end());
        }
    }
    /// NEWOBJ and NEWOBJ_EX: objects of a class, which only opaque ones are.
    void make_object(std::size_t arguments, unsigned operation)
    {
        for (std::size_t i = 0; i < arguments; ++i) { given_.push_back(pop()); }
        const auto& type = values_[pop()];
        if (type.what != kind::opaque) { refuse(message("has the instruction ", operation)); }
        push_opaque(type.text);
    }
    void append(const std::vector<index>& items, kind to)
    {
        value& collection = top();
        if (collection.what == kind::opaque) {
            given_.insert(given_.end(), items.begin(), items.end());
            return;
        }
        if (collection.what != to || (to == kind::dictionary && items.size() % 2 != 0)) {
            damaged("adds to something that is no collection");
        }
        collection.items.insert(collection.items.end(), items.begin(), items.end());
    }

    void step(unsigned operation)
    {
        switch (operation) {
        case 0x80: // PROTO
            if (const auto version = take_number<std::uint8_t>(); version < 2 || version > 5) {
                refuse(message("is of protocol ", unsigned{version}));
            }
            break;
        case 0x95: (void)take(8); break; // FRAME
        case '(': marks_.push_back(stack_.size()); break;
        case '0': (void)pop(); break;
        case '}': push({kind::dictionary, false, {}, 0, {}, {}}); break;
        case ']': push({kind::list, false, {}, 0, {}, {}}); break;
        case ')': push({kind::tuple, false, {}, 0, {}, {}}); break;
        case 'q': put(take_number<std::uint8_t>()); break;
        case 'r': put(take_number<std::uint32_t>()); break;
        case 0x94: put(memo_.size()); break; // MEMOIZE
        case 'h': get(take_number<std::uint8_t>()); break;
        case 'j': get(take_number<std::uint32_t>()); break;
        case 'X': push_text(take_number<std::uint32_t>()); break;
        case 0x8c: push_text(take_number<std::uint8_t>()); break; // SHORT_BINUNICODE
        case 0x8d: push_text(take_number<std::uint64_t>()); break; // BINUNICODE8
        case 'T': push_text(take_number<std::uint32_t>()); break; // BINSTRING
        case 'U': push_text(take_number<std::uint8_t>()); break; // SHORT_BINSTRING
        case 'J': push_number(take_number<std::int32_t>()); break;
        case 'K': push_number(take_number<std::uint8_t>()); break;
        case 'M': push_number(take_number<std::uint16_t>()); break;
        case 0x8a: push_long(take_number<std::uint8_t>()); break; // LONG1
        case 'G': // BINFLOAT
            (void)take(8);
            push({kind::other, false, {}, 0, {}, {}});
            break;
        case 'C': push_bytes(take_number<std::uint8_t>()); break; // SHORT_BINBYTES
        case 'B': push_bytes(take_number<std::uint32_t>()); break; // BINBYTES
        case 0x8e: // BINBYTES8
        case 0x96: push_bytes(take_number<std::uint64_t>()); break; // BYTEARRAY8
        case 0x81: make_object(1, operation); break;
        case 0x92: make_object(2, operation); break;
        case 0x8f: push_opaque("a set"); break;
        case 0x90: // ADDITEMS
            append(pop_to_mark(), kind::opaque);
            break;
        case 0x91: { // FROZENSET
            const auto items = pop_to_mark();
            given_.insert(given_.end(), items.begin(), items.end());
            push_opaque("a set");
            break;
        }
        case 'N': push({}); break;
        case 0x88: push_number(1, true); break;
        case 0x89: push_number(0, true); break;
        case 't': push({kind::tuple, false, {}, 0, {}, pop_to_mark()}); break;
        case 0x85: push_tuple(1); break;
        case 0x86: push_tuple(2); break;
        case 0x87: push_tuple(3); break;
        case 'a': {
            const index item = pop();
            append({item}, kind::list);
            break;
        }
        case 'e': append(pop_to_mark(), kind::list); break;
        case 's': {
            const index item = pop(), key = pop();
            append({key, item}, kind::dictionary);
            break;
        }
        case 'u': append(pop_to_mark(), kind::dictionary); break;
        case 'c': {
            const auto module = take_line();
            const auto name = take_line();
            push_global(module, name);
            break;
        }
        case 0x93: { // STACK_GLOBAL
            const auto& name = values_[pop()];
            const auto& module = values_[pop()];
            if (name.what != kind::text || module.what != kind::text) { damaged("names something by no text"); }
            push_global(module.text, name.text);
            break;
        }
        case 'Q': push_storage(); break;
        case 'R': call(); break;
        case 'b': { // BUILD: attributes of a dictionary (state_dict's _metadata) say nothing about tensors
            const index given = pop();
            const auto& state = values_[given];
            if (top().what == kind::opaque) {
                given_.push_back(given);
                break;
            }
            if (top().what != kind::dictionary || state.what != kind::dictionary) {
                refuse("sets the state of an object");
            }
            break;
        }
        default:
            refuse(operation >= 0x20 && operation < 0x7f
                    ? message("has the instruction '", std::string(1, static_cast<char>(operation)), "'")
                    : message("has the instruction ", operation));
        }
    }
    void push_text(std::uint64_t size)
    {
        const auto text = take(size);
        push({kind::text, false, {}, 0, text, {}});
    }
    void push_bytes(std::uint64_t size)
    {
        (void)take(size);
        push({kind::other, false, {}, 0, {}, {}});
    }
    void push_long(std::uint64_t size)
    {
        const auto bytes = take(size);
        if (size > 8) { // of a generator of random numbers
            push_opaque("a number above 2^63");
            return;
        }
        std::uint64_t number = 0;
        for (std::size_t i = 0; i < bytes.size(); ++i) {
            number |= static_cast<std::uint64_t>(static_cast<unsigned char>(bytes[i])) << (8 * i);
        }
        if (!bytes.empty() && bytes.size() < 8 && (static_cast<unsigned char>(bytes.back()) & 0x80u)) {
            number |= ~std::uint64_t{0} << (8 * bytes.size());
        }
        push_number(static_cast<std::int64_t>(number));
    }

    struct named_type {
        std::string_view module, name;
        taskvec::dtype type;
    };
    [[nodiscard]] static const named_type* type_of(std::string_view module, std::string_view name)
    {
        using enum taskvec::dtype;
        static constexpr named_type types[] = {{"torch", "DoubleStorage", f64}, {"torch", "FloatStorage", f32},
            {"torch", "HalfStorage", f16}, {"torch", "BFloat16Storage", bf16}, {"torch", "LongStorage", i64},
            {"torch", "IntStorage", i32}, {"torch", "ShortStorage", i16}, {"torch", "CharStorage", i8},
            {"torch", "ByteStorage", u8}, {"torch", "BoolStorage", boolean}, {"torch", "ComplexFloatStorage", c64},
            {"torch.storage", "UntypedStorage", u8}, {"torch", "float64", f64}, {"torch", "float32", f32},
            {"torch", "float16", f16}, {"torch", "bfloat16", bf16}, {"torch", "int64", i64}, {"torch", "int32", i32},
            {"torch", "int16", i16}, {"torch", "int8", i8}, {"torch", "uint64", u64}, {"torch", "uint32", u32},
            {"torch", "uint16", u16}, {"torch", "uint8", u8}, {"torch", "bool", boolean}, {"torch", "complex64", c64},
            {"torch", "float8_e4m3fn", f8_e4m3}, {"torch", "float8_e5m2", f8_e5m2},
            {"torch", "float8_e8m0fnu", f8_e8m0}, {"torch", "float8_e4m3fnuz", f8_e4m3fnuz},
            {"torch", "float8_e5m2fnuz", f8_e5m2fnuz}};
        for (const auto& one : types) {
            if (one.module == module && one.name == name) { return &one; }
        }
        return nullptr;
    }
    /// Whether a name is one of those by which pickles run code or reach the system: no data has them.
    [[nodiscard]] static bool runs_commands(std::string_view module, std::string_view name)
    {
        if (module == "builtins" || module == "__builtin__") {
            for (const std::string_view one : {"eval", "exec", "execfile", "compile", "__import__", "open", "getattr",
                     "setattr", "delattr", "globals", "locals", "vars", "input", "breakpoint", "apply", "file"}) {
                if (name == one) { return true; }
            }
            return false;
        }
        const auto package = module.substr(0, module.find('.'));
        for (const std::string_view one : {"os", "posix", "nt", "subprocess", "commands", "sys", "pty", "platform",
                 "shutil", "socket", "ctypes", "_ctypes", "importlib", "imp", "runpy", "pickle", "_pickle", "cPickle",
                 "marshal", "code", "codeop", "pdb", "bdb", "cProfile", "profile", "timeit", "trace", "webbrowser",
                 "urllib", "http", "ftplib", "smtplib", "requests", "multiprocessing", "asyncio", "signal", "tempfile",
                 "pip", "venv", "ensurepip", "pydoc", "distutils", "setuptools"}) {
            if (package == one) { return true; }
        }
        return module == "torch.hub" || (module == "torch" && name == "load") || name == "runstring";
    }
    /// What a global is to call(): of a few names that are known.
    enum callable : std::int64_t { data_type, ordered_dictionary, tensor_v2, tensor_v3, parameter, torch_size };

    void push_global(std::string_view module, std::string_view name)
    {
        value global{kind::global, false, {}, data_type, name, {}};
        if (const auto* const type = type_of(module, name)) { global.type = type->type; }
        else if (module == "collections" && name == "OrderedDict") {
            global.number = ordered_dictionary;
        }
        else if (module == "torch._utils" && (name == "_rebuild_tensor_v2" || name == "_rebuild_tensor")) {
            global.number = tensor_v2;
        }
        else if (module == "torch._utils" && name == "_rebuild_tensor_v3") {
            global.number = tensor_v3;
        }
        else if (module == "torch._utils" && name == "_rebuild_parameter") {
            global.number = parameter;
        }
        else if (module == "torch" && name == "Size") {
            global.number = torch_size;
        }
        else {
            const auto words = message("'", first_words(module, 80), ".", first_words(name, 80), "'");
            if (runs_commands(module, name)) {
                raise<format_error>(error_code::pickle_unsupported,
                    message("is a PyTorch file whose pickle names ", words,
                        ", which no model needs and which would run as the file is loaded; nothing of it was run: do "
                        "not load this file, fetch the model from where you trust it"),
                    std::string(file_), place_);
            }
            if (first_opaque_.empty()) { first_opaque_ = words; }
            push_opaque(*names_.insert(words).first);
            return;
        }
        push(std::move(global));
    }
    void push_storage()
    {
        const auto& id = values_[pop()];
        if (id.what != kind::tuple || id.items.size() != 5) { damaged("has a storage that is none"); }
        const auto& word = values_[id.items[0]];
        const auto& type = values_[id.items[1]];
        const auto& key = values_[id.items[2]];
        const auto& count = values_[id.items[4]];
        if (type.what == kind::opaque) {
            push_opaque(type.text);
            return;
        }
        if (word.what != kind::text || word.text != "storage" || type.what != kind::global || type.number != data_type
            || key.what != kind::text || count.what != kind::number || count.truth || count.number < 0) {
            damaged("has a storage that is none");
        }
        push({kind::storage, false, type.type, count.number, key.text, {}});
    }
    void call()
    {
        const index given = pop(), callee = pop();
        if (values_[callee].what == kind::opaque) {
            given_.push_back(given);
            push_opaque(values_[callee].text);
            return;
        }
        const auto arguments = values_[given].items;
        const value function = values_[callee];
        if (function.what != kind::global || function.number == data_type || values_[given].what != kind::tuple) {
            refuse("calls what is no function of tensors");
        }
        switch (function.number) {
        case ordered_dictionary:
            if (!arguments.empty()) { refuse("fills an OrderedDict by a call"); }
            push({kind::dictionary, false, {}, 0, {}, {}});
            break;
        case torch_size:
            if (arguments.size() != 1 || values_[arguments[0]].what != kind::tuple) {
                damaged("has a size that is none");
            }
            stack_.push_back(arguments[0]);
            break;
        case parameter:
            if (!arguments.empty() && values_[arguments[0]].what == kind::opaque) {
                stack_.push_back(arguments[0]);
                break;
            }
            if (arguments.empty() || values_[arguments[0]].what != kind::tensor) {
                damaged("has a parameter that is no tensor");
            }
            stack_.push_back(arguments[0]);
            break;
        default: push_tensor(arguments, function.number == tensor_v3);
        }
    }
    void push_tensor(const std::vector<index>& arguments, bool typed)
    {
        if (arguments.size() < (typed ? 7u : 4u)) { damaged("has a tensor that is none"); }
        const auto& storage = values_[arguments[0]];
        const auto& offset = values_[arguments[1]];
        const auto& shape = values_[arguments[2]];
        const auto& strides = values_[arguments[3]];
        if (storage.what == kind::opaque || (typed && values_[arguments[6]].what == kind::opaque)) {
            push_opaque(storage.what == kind::opaque ? storage.text : values_[arguments[6]].text);
            return;
        }
        const auto numbers = [&](const value& tuple) {
            return tuple.what == kind::tuple && std::all_of(tuple.items.begin(), tuple.items.end(), [&](index item) {
                return values_[item].what == kind::number && !values_[item].truth && values_[item].number >= 0;
            });
        };
        if (storage.what != kind::storage || offset.what != kind::number || offset.truth || offset.number < 0
            || !numbers(shape) || !numbers(strides) || shape.items.size() != strides.items.size()) {
            damaged("has a tensor that is none");
        }
        value tensor{kind::tensor, false, storage.type, offset.number, {}, {arguments[0], arguments[2], arguments[3]}};
        const std::size_t described = typed ? 7 : 6; // bits that torch keeps beside the bytes
        if (arguments.size() > described) { tensor.items.push_back(arguments[described]); }
        if (typed) {
            const auto& type = values_[arguments[6]];
            if (type.what != kind::global || type.number != data_type) { damaged("has a tensor of no type"); }
            tensor.type = type.type;
        }
        push(std::move(tensor));
    }

    std::string_view code_, file_;
    std::size_t place_ = 0;
    std::vector<value> values_;
    std::vector<index> stack_;
    std::vector<std::size_t> marks_;
    std::map<std::uint64_t, index> memo_;
    std::set<std::string> names_; ///< of opaque values
    std::string first_opaque_;
    std::vector<index> given_; ///< what opaque values were given
    std::vector<bool> reached_; ///< of values_, in the end
};

/// Tensors of a PyTorch file by name, each checked against the archive.
class pytorch_tensors {
public:
    pytorch_tensors(std::string_view bytes, std::string_view file)
        : file_(file)
        , archive_(bytes, file)
    {
        const zip_directory::entry* code = nullptr;
        for (const auto& entry : archive_.entries()) {
            const auto slash = entry.name.find('/');
            if (slash == entry.name.npos || entry.name.substr(slash) != "/data.pkl") { continue; }
            if (code) { fail("holds two pickles"); }
            code = &entry;
            folder_ = std::string(entry.name.substr(0, slash + 1));
        }
        if (!code || archive_.find(folder_ + "constants.pkl")) {
            const auto kind = kind_of_zip(bytes);
            raise<format_error>(error_code::not_safetensors, kind.sentence(), std::string(file));
        }
        if (!code->stored || code->size > pickle_size_limit) {
            fail(code->stored ? "has a pickle of more than 100 MB" : "is compressed, which PyTorch never does");
        }
        if (const auto* const order = archive_.find(folder_ + "byteorder");
            order && archive_.content(*order) != "little") {
            fail("was written by a big-endian machine");
        }
        pickle_reader pickle(archive_.content(*code), file);
        const auto& result = pickle.run();
        read(pickle, result);
    }
    [[nodiscard]] pytorch_contents take() { return std::move(contents_); }

private:
    [[noreturn]] void fail(const std::string& what) const
    {
        raise<format_error>(error_code::pickle_unsupported,
            message("is a PyTorch file that ", what, ": ", convert_to_safetensors), std::string(file_));
    }
    [[noreturn]] void wrong(const std::string& name, const std::string& what) const
    {
        raise<format_error>(error_code::archive_damaged,
            message("tensor '", name, "' ", what, ": the file is damaged; ", fetch_again), std::string(file_));
    }

    using value = pickle_reader::value;

    /// The same for tensors that lie in dictionaries of dictionaries, which safetensors has no names for.
    [[noreturn]] void fail_nested(const std::string& what, const value& key) const
    {
        const auto place =
            key.what == pickle_reader::kind::text ? "'" + first_words(key.text) + "'" : std::string("KEY");
        raise<format_error>(error_code::pickle_unsupported,
            message("is a PyTorch file that ", what,
                ": save the dictionary that is meant by itself, such as by "
                "safetensors.torch.save_file(torch.load(FILE, weights_only=True)[",
                place, "], 'model.safetensors')"),
            std::string(file_));
    }
    /// How many values of a dictionary are tensors.
    [[nodiscard]] std::size_t tensors_in(const pickle_reader& pickle, const value& dictionary)
    {
        const auto [place, is_new] = tensors_.try_emplace(&dictionary, 0); // one dictionary may stand in many places
        for (std::size_t i = 1; is_new && i < dictionary.items.size(); i += 2) {
            place->second += pickle.at(dictionary.items[i]).what == pickle_reader::kind::tensor ? 1u : 0u;
        }
        return place->second;
    }
    /// Whether a key of a training checkpoint names what training needs, and no model.
    [[nodiscard]] static bool belongs_to_training(std::string_view key)
    {
        for (const std::string_view word :
            {"optim", "sched", "scaler", "rng", "random", "callback", "hyper", "loops"}) {
            if (key.find(word) != key.npos) { return true; }
        }
        return false;
    }
    /// A dictionary within another, by name.
    struct part {
        std::string_view key;
        const value* content = nullptr;
    };
    /// Whether a dictionary holds tensors, itself or in those within it that belong to a model.
    [[nodiscard]] bool holds_tensors(const pickle_reader& pickle, const value& dictionary, unsigned depth = 0)
    {
        if (tensors_in(pickle, dictionary) > 0) { return true; }
        const auto [known, is_new] = holding_.try_emplace(&dictionary, false); // dictionaries may hold themselves
        if (is_new && depth < 8) {
            const bool holds = !parts_with_tensors(pickle, dictionary, depth + 1).empty();
            holding_[&dictionary] = holds;
            return holds;
        }
        return known->second;
    }
    /// The dictionaries within another that hold tensors.
    [[nodiscard]] std::vector<part> parts_with_tensors(
        const pickle_reader& pickle, const value& dictionary, unsigned depth = 0)
    {
        using kind = pickle_reader::kind;
        std::vector<part> found;
        for (std::size_t i = 0; i < dictionary.items.size(); i += 2) {
            const auto& key = pickle.at(dictionary.items[i]);
            const auto& inner = pickle.at(dictionary.items[i + 1]);
            if (key.what != kind::text || inner.what != kind::dictionary || belongs_to_training(key.text)) { continue; }
            if (holds_tensors(pickle, inner, depth)) { found.push_back({key.text, &inner}); }
        }
        return found;
    }
    /// The dictionary within a training checkpoint that has one of a model's usual names. Not one with fewer tensors
    /// than lie beside it.
    [[nodiscard]] part usual_part(const pickle_reader& pickle, const value& checkpoint)
    {
        using kind = pickle_reader::kind;
        const std::size_t own = tensors_in(pickle, checkpoint);
        for (const std::string_view usual : {"state_dict", "model_state_dict", "model", "module", "params_ema",
                 "params", "ema", "net", "network", "weights"}) {
            for (std::size_t i = 0; i < checkpoint.items.size(); i += 2) {
                const auto& key = pickle.at(checkpoint.items[i]);
                const auto& one = pickle.at(checkpoint.items[i + 1]);
                if (key.what != kind::text || key.text != usual) { continue; }
                if (const auto* const unknown = own == 0 ? opaque_in(pickle, one) : nullptr) {
                    pickle.refuse_opaque(unknown->text);
                }
                const bool holds = one.what == kind::dictionary && holds_tensors(pickle, one);
                if (holds && tensors_in(pickle, one) >= own) { return {usual, &one}; }
            }
        }
        return {};
    }
    /// The dictionary within a training checkpoint that alone holds tensors.
    [[nodiscard]] part only_part(const pickle_reader& pickle, const value& checkpoint)
    {
        const auto parts = parts_with_tensors(pickle, checkpoint);
        if (parts.size() > 1) {
            std::string names;
            for (const auto& one : parts) { names += (names.empty() ? "'" : ", '") + first_words(one.key) + "'"; }
            const value key{pickle_reader::kind::text, false, {}, 0, parts.front().key, {}};
            fail_nested("holds several dictionaries of tensors (" + names + ")", key);
        }
        return parts.empty() ? part{} : parts.front();
    }
    /// The model of a training checkpoint: under one of the usual names, or the only dictionary with tensors, down to
    /// the one that has them. What lies beside it is left out, with a note; tensors too, where they are fewer.
    [[nodiscard]] const value* state_dict_in(const pickle_reader& pickle, const value& result)
    {
        const auto* model = &result;
        std::string way, left;
        for (unsigned depth = 0; depth < 4; ++depth) {
            const std::size_t own = tensors_in(pickle, *model);
            auto inner = usual_part(pickle, *model);
            if (!inner.content && own == 0) { inner = only_part(pickle, *model); }
            if (!inner.content) { break; }
            if (own > 0) { left = message("; beside it ", own, own == 1 ? " tensor is" : " tensors are", " left out"); }
            way += (way.empty() ? "" : ".") + first_words(inner.key);
            model = inner.content;
        }
        if (way.empty()) { return model; }
        const auto& beside = pickle.first_opaque();
        contents_.notes.push_back(message("'", std::string(file_), "': its '", way, "' is taken", left,
            beside.empty() ? std::string() : "; what lies beside it names " + beside + ", and was not built"));
        return model;
    }

    void read(const pickle_reader& pickle, const pickle_reader::value& result)
    {
        using kind = pickle_reader::kind;
        if (result.what != kind::dictionary) { fail("holds no dictionary of tensors (a state_dict)"); }
        const auto* const model = state_dict_in(pickle, result);
        check_known(pickle, *model);
        std::size_t others = 0;
        std::string first_other;
        std::set<std::string_view> seen;
        for (std::size_t i = 0; i < model->items.size(); i += 2) {
            const auto& key = pickle.at(model->items[i]);
            const auto& tensor = pickle.at(model->items[i + 1]);
            if (key.what != kind::text || tensor.what != kind::tensor) {
                if (tensor.what == kind::dictionary && tensors_in(pickle, tensor) > 0) {
                    fail_nested("holds tensors and, under "
                            + (key.what == kind::text ? "'" + first_words(key.text) + "'" : std::string("a number"))
                            + ", more of them",
                        key);
                }
                ++others;
                if (first_other.empty()) { first_other = key.what == kind::text ? first_words(key.text) : "a number"; }
                continue;
            }
            if (!seen.insert(key.text).second) { // as in Python the last one would win: nothing that is saved has two
                fail(message("names tensor '", first_words(key.text), "' twice"));
            }
            add(std::string(key.text), pickle, tensor);
        }
        if (contents_.header.entries.empty() && others > 0) { fail("holds no tensors by name"); }
        if (others > 0) {
            contents_.notes.push_back(message("'", std::string(file_), "': ", others,
                others == 1 ? " value that is no tensor ('" : " values that are no tensors ('", first_other,
                others == 1 ? "') is left out" : "' …) are left out"));
        }
        auto& entries = contents_.header.entries;
        std::stable_sort(
            entries.begin(), entries.end(), [](const auto& a, const auto& b) { return a.offset < b.offset; });
        contents_.header.metadata.emplace("format", "pt");
    }

    /// The value itself where it is opaque, or the first key or value of a dictionary that is.
    [[nodiscard]] static const pickle_reader::value* opaque_in(
        const pickle_reader& pickle, const pickle_reader::value& one)
    {
        using kind = pickle_reader::kind;
        if (one.what == kind::opaque) { return &one; }
        if (one.what != kind::dictionary) { return nullptr; }
        for (const auto item : one.items) {
            if (pickle.at(item).what == kind::opaque) { return &pickle.at(item); }
        }
        return nullptr;
    }
    /// Refuses a model with values, or dictionaries of values, that nothing is known of, and one that was given to
    /// such.
    static void check_known(const pickle_reader& pickle, const pickle_reader::value& model)
    {
        using kind = pickle_reader::kind;
        if (const auto* const one = opaque_in(pickle, model)) { pickle.refuse_opaque(one->text); }
        bool given = pickle.was_given(model);
        for (const auto item : model.items) {
            const auto& value = pickle.at(item);
            if (const auto* const one = opaque_in(pickle, value)) { pickle.refuse_opaque(one->text); }
            given = given || (value.what == kind::tensor && pickle.was_given(value));
        }
        if (given) {
            const auto& first = pickle.first_opaque();
            pickle.refuse("gives the model's tensors to " + (first.empty() ? std::string("a set") : first));
        }
    }
    void add(std::string name, const pickle_reader& pickle, const pickle_reader::value& tensor)
    {
        if (name.empty() || !is_text(name)) { fail("has a tensor whose name is empty or no UTF-8"); }
        if (tensor.items.size() > 3) { check_metadata(name, pickle, pickle.at(tensor.items[3])); }
        const auto& storage = pickle.at(tensor.items[0]);
        const auto* const entry = archive_.find(folder_ + "data/" + std::string(storage.text));
        if (!entry) { wrong(name, message("lies in 'data/", first_words(storage.text), "', which is not there")); }
        if (!entry->stored) { fail(message("has tensor '", name, "' compressed, which PyTorch never does")); }
        const std::uint64_t width = bits_per_element(tensor.type) / 8;
        const std::uint64_t storage_width = bits_per_element(storage.type) / 8;
        if (static_cast<std::uint64_t>(storage.number) > entry->size / storage_width
            || static_cast<std::uint64_t>(storage.number) * storage_width != entry->size) {
            wrong(name,
                message(
                    "lies in a storage of ", storage.number, " × ", storage_width, " bytes, which has ", entry->size));
        }
        extents shape, strides;
        std::uint64_t count = 1;
        bool empty = false;
        for (const auto item : pickle.at(tensor.items[1]).items) {
            shape.push_back(pickle.at(item).number);
            empty = empty || shape.back() == 0;
        }
        for (const auto item : pickle.at(tensor.items[2]).items) { strides.push_back(pickle.at(item).number); }
        for (const auto extent : shape) {
            if (!empty && detail::product_wraps(count, static_cast<std::uint64_t>(extent), count)) {
                wrong(name, "has a shape whose product is above 2^64-1");
            }
        }
        if (empty) { count = 0; }
        const auto first = static_cast<std::uint64_t>(tensor.number), room = entry->size / width;
        const bool spread = first <= room && count > room - first; // more elements than bytes: expanded, or overlapping
        if (first > room) {
            wrong(name,
                message("of ", to_string(tensor.type), " ", to_string(shape), " runs past the end of its storage"));
        }
        if (const const_tensor_ref view{nullptr, tensor.type, shape, strides};
            !empty && (spread || !view.contiguous())) {
            std::uint64_t last = first, way = 0;
            for (std::size_t d = 0; d < shape.size(); ++d) {
                if (detail::product_wraps(
                        static_cast<std::uint64_t>(shape[d]) - 1, static_cast<std::uint64_t>(strides[d]), way)
                    || detail::sum_wraps(last, way, last) || last >= room) {
                    wrong(name,
                        message("of ", to_string(tensor.type), " ", to_string(shape), " with strides ",
                            to_string(strides), " runs past the end of its storage"));
                }
            }
            if (spread) { // a file of a few bytes must not fill the disk
                if (last >= room || count > (expanded_bytes_limit - expanded_) / width) {
                    fail(message("has tensor '", name, "' of ", to_string(tensor.type), " ", to_string(shape),
                        " expanded from ", room - first, " elements, and more than ", expanded_bytes_limit,
                        " bytes of such tensors"));
                }
                expanded_ += count * width;
            }
            contents_.strides.emplace(name, std::move(strides));
        }
        contents_.header.entries.push_back(
            {std::move(name), tensor.type, std::move(shape), entry->offset + first * width, count * width});
    }
    /// Refuses a tensor whose numbers are others than its bytes: lazily conjugated or negated views have a bit for it.
    void check_metadata(
        const std::string& name, const pickle_reader& pickle, const pickle_reader::value& metadata) const
    {
        using kind = pickle_reader::kind;
        if (metadata.what == kind::none || (metadata.what == kind::number && metadata.number == 0)) { return; }
        if (metadata.what != kind::dictionary) {
            fail(message("says more of tensor '", name, "' than its type, shape and bytes"));
        }
        for (std::size_t i = 0; i < metadata.items.size(); i += 2) {
            const auto& key = pickle.at(metadata.items[i]);
            const auto& said = pickle.at(metadata.items[i + 1]);
            const auto word = key.what == kind::text ? key.text : std::string_view();
            if ((word == "neg" || word == "conj") && said.what == kind::number && said.number == 0) { continue; }
            if (word == "neg" || word == "conj") {
                raise<format_error>(error_code::pickle_unsupported,
                    message("is a PyTorch file whose tensor '", name, "' is a view that is ",
                        word == "neg" ? "negated" : "conjugated", " as it is read (its metadata has '", word,
                        "'), which its bytes do not show: save it with .resolve_conj().resolve_neg()"),
                    std::string(file_));
            }
            fail(message("says '", first_words(word), "' of tensor '", name,
                "', which is neither its type, its shape nor its bytes"));
        }
    }
    /// Whether a name can be a safetensors name: UTF-8.
    [[nodiscard]] static bool is_text(std::string_view text)
    {
        for (std::size_t i = 0; i < text.size();) {
            const auto first = static_cast<unsigned char>(text[i]);
            const std::size_t more = first < 0x80 ? 0
                : first < 0xc2                    ? 4
                : first < 0xe0                    ? 1
                : first < 0xf0                    ? 2
                : first < 0xf5                    ? 3
                                                  : 4;
            if (more == 4 || text.size() - i <= more) { return false; }
            for (std::size_t k = 1; k <= more; ++k) {
                if ((static_cast<unsigned char>(text[i + k]) & 0xc0u) != 0x80u) { return false; }
            }
            const auto second = more > 0 ? static_cast<unsigned char>(text[i + 1]) : 0u;
            if ((first == 0xe0 && second < 0xa0) || (first == 0xed && second > 0x9f) || (first == 0xf0 && second < 0x90)
                || (first == 0xf4 && second > 0x8f)) {
                return false;
            }
            i += more + 1;
        }
        return true;
    }

    std::string_view file_;
    zip_directory archive_;
    std::string folder_;
    std::uint64_t expanded_ = 0; ///< bytes of tensors that have more elements than their storage
    std::map<const value*, std::size_t> tensors_; // in dictionaries
    std::map<const value*, bool> holding_; // of dictionaries: see holds_tensors()
    pytorch_contents contents_;
};

} // namespace detail

/// Reads what a PyTorch file (torch.save() since 1.6) holds: a dictionary from names to tensors, or a training
/// checkpoint with one under `state_dict`, `model` or the like. The pickle is interpreted by a machine that knows
/// numbers, texts, collections and the functions that rebuild tensors and parameters; nothing runs. Anything else that
/// it names is refused by that name where the model holds it or was given to it, and otherwise (the arguments of a
/// training, beside its state_dict) not built, with a note; what else it does is refused. Checked: every record of the
/// archive (64-bit ones too), that entries share no bytes and are neither compressed nor encrypted, storages against
/// their sizes, tensors against their storages. Values that are no tensors are noted. Throws format_error naming `file`
/// and the tensor. Cost: O(pickle); no tensor byte is read.
[[nodiscard]] inline pytorch_contents parse_pytorch(std::span<const std::byte> bytes, std::string_view file)
{
    return detail::pytorch_tensors({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, file).take();
}

namespace detail {

/// Copies a tensor of elements of `Word` to row-major memory, in tiles of its last two dimensions: the columns of a
/// transposed matrix share lines of the cache.
template <class Word>
void copy_rows(const std::byte* from, const extents& shape, const extents& strides, std::byte* to)
{
    constexpr std::int64_t tile = 32;
    const std::size_t rank = shape.size();
    const std::int64_t columns = shape[rank - 1], rows = rank > 1 ? shape[rank - 2] : 1;
    const std::int64_t by_column = strides[rank - 1], by_row = rank > 1 ? strides[rank - 2] : 0;
    std::int64_t outer = 1;
    for (std::size_t d = 0; d + 2 < rank; ++d) { outer *= shape[d]; }
    for (std::int64_t block = 0; block < outer; ++block) {
        std::int64_t begin = 0, rest = block;
        for (std::size_t d = rank; d-- > 2;) {
            begin += rest % shape[d - 2] * strides[d - 2];
            rest /= shape[d - 2];
        }
        std::byte* const out = to + static_cast<std::size_t>(block * rows * columns) * sizeof(Word);
        for (std::int64_t i0 = 0; i0 < rows; i0 += tile) {
            for (std::int64_t j0 = 0; j0 < columns; j0 += tile) {
                for (std::int64_t i = i0; i < std::min(rows, i0 + tile); ++i) {
                    for (std::int64_t j = j0; j < std::min(columns, j0 + tile); ++j) {
                        Word word;
                        std::memcpy(&word,
                            from + static_cast<std::size_t>(begin + i * by_row + j * by_column) * sizeof(Word),
                            sizeof word);
                        std::memcpy(out + static_cast<std::size_t>(i * columns + j) * sizeof(Word), &word, sizeof word);
                    }
                }
            }
        }
    }
}

} // namespace detail

/// Lays the tensors of contents.strides out row-major, one after another, in a file without a name in `folder`, and
/// gives their entries offsets behind the end of `bytes`, as safetensors_file takes them; a note says so. Null where
/// all lie so already. Memory: none but the page cache's. Throws io_error. Cost: one read of these tensors.
[[nodiscard]] inline std::shared_ptr<const std::byte> lay_out_rows(pytorch_contents& contents,
    std::span<const std::byte> bytes, std::string_view file, const std::filesystem::path& folder)
{
    if (contents.strides.empty()) { return nullptr; }
    std::uint64_t total = 0;
    const auto padded = [](std::uint64_t size) { return (size + 63) / 64 * 64; };
    for (const auto& entry : contents.header.entries) {
        if (contents.strides.contains(entry.name)) { total += padded(entry.bytes); }
    }
    auto* const memory =
        static_cast<std::byte*>(detail::map_unnamed_file(folder, total, "tensors that are stored transposed"));
    const auto size = static_cast<std::size_t>(total);
    std::shared_ptr<const std::byte> result(
        memory, [size](const std::byte* data) { detail::system::unmap(data, size); });
    std::uint64_t at = 0;
    for (auto& entry : contents.header.entries) {
        const auto place = contents.strides.find(entry.name);
        if (place == contents.strides.end()) { continue; }
        const auto* const from = bytes.data() + entry.offset;
        switch (bits_per_element(entry.dtype)) {
        case 8: detail::copy_rows<std::uint8_t>(from, entry.shape, place->second, memory + at); break;
        case 16: detail::copy_rows<std::uint16_t>(from, entry.shape, place->second, memory + at); break;
        case 32: detail::copy_rows<std::uint32_t>(from, entry.shape, place->second, memory + at); break;
        default: detail::copy_rows<std::uint64_t>(from, entry.shape, place->second, memory + at);
        }
        entry.offset = bytes.size() + at;
        at += padded(entry.bytes);
    }
    const auto count = contents.strides.size();
    contents.notes.push_back(message("'", std::string(file), "': ", count, count == 1 ? " tensor ('" : " tensors ('",
        contents.strides.begin()->first, count == 1 ? "') does" : "' …) do",
        " not lie row by row there (transposed or expanded, say): laid out in a temporary file of ", total, " bytes"));
    contents.strides.clear();
    return result;
}

} // namespace taskvec::inline TASKVEC_ABI
