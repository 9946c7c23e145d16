// Pickles, read without Python: numbers, texts, collections and tensors, and nothing else. No code runs.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/dtype.hpp>
#include <taskvec/core/error.hpp>
#include <taskvec/core/tensor_ref.hpp>
#include <taskvec/formats/file_kind.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The largest pickle that is read; tensors' bytes lie beside it.
inline constexpr std::size_t pickle_size_limit = 100'000'000;
/// The most values that a pickle may build: room for 200,000 tensors.
inline constexpr std::size_t pickle_value_limit = 5'000'000;

namespace detail {

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

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
