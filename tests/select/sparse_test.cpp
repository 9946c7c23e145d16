// Sparse vectors: index lists, checks, and entries added in place and taken back, from indices and from bits.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/select/sparse.hpp>

#include <doctest/doctest.h>

#include <array>
#include <cstring>
#include <iterator>
#include <memory_resource>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

using namespace taskvec;

static_assert(std::random_access_iterator<index_list::iterator>);
static_assert(sparse_entries<sparse_vector<float>> && sparse_entries<bitmask_vector<double>>
    && sparse_entries<sparse_view> && !sparse_entries<std::vector<float>>);

TEST_CASE("an index takes four bytes until one needs eight")
{
    index_list list{3, 15, 0xffffffff};
    CHECK_FALSE(list.wide());
    CHECK(static_cast<const std::uint32_t*>(list.data())[2] == 0xffffffff);
    list.push_back(0x1'0000'0000);
    CHECK(list.wide());
    CHECK(list == index_list{3, 15, 0xffffffff, 0x1'0000'0000});
    CHECK(static_cast<const std::uint64_t*>(list.data())[0] == 3);
    CHECK(std::vector<std::uint64_t>(list.begin(), list.end())
        == std::vector<std::uint64_t>{3, 15, 0xffffffff, 0x1'0000'0000});
    CHECK(*std::lower_bound(list.begin(), list.end(), 4u) == 15);
    list.reserve(6);
    list.push_back(7); // however small: the list stays wide
    CHECK(list.wide());
    CHECK(list.back() == 7);
    CHECK(list.size() == 5);
    CHECK_FALSE(index_list(5, 0x1'0000'0000).wide()); // the last index of so many elements is 2^32 - 1
    CHECK(index_list(5, 0x1'0000'0001).wide());
    CHECK(index_list(2, 9) == index_list(2, std::uint64_t{1} << 40));
    CHECK_FALSE(index_list(2, 9) == index_list(3, 9));
    const std::uint64_t stored[] = {7, 8};
    for (const std::uint64_t elements : {std::uint64_t{9}, std::uint64_t{1} << 40}) { // of either width
        index_list filled(4, elements);
        filled.store(2, stored, 2);
        filled.store(0, stored, 1);
        CHECK(filled == index_list{7, 0, 7, 8});
        CHECK_FALSE(filled == index_list{7, 0, 7, 9});
    }
}

TEST_CASE_TEMPLATE(
    "bits, indices and views of any alignment add and restore the same words", T, float, double, bf16, f16)
{
    using A = arithmetic_type<T>;
    std::mt19937 random(11);
    std::normal_distribution<double> normal;
    for (const double density : {0.001, 0.05, 0.7, 1.0}) {
        sparse_vector<A> sparse{{3, 70'001}, {}, {}};
        std::vector<T> base;
        for (std::size_t i = 0; i < 210'003; ++i) {
            base.push_back(narrow<T>(static_cast<A>(normal(random))));
            if (std::uniform_real_distribution<double>()(random) < density) {
                sparse.indices.push_back(i);
                sparse.values.push_back(static_cast<A>(normal(random)));
            }
        }
        std::vector<T> expected = base;
        for (std::size_t e = 0; e < sparse.kept(); ++e) {
            volatile A product = static_cast<A>(-0.7) * sparse.values[e];
            T& word = expected[sparse.indices[e]];
            word = narrow<T>(static_cast<A>(widen<A>(word) + product));
        }
        const auto same = [](const std::vector<T>& a, const std::vector<T>& b) {
            return std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
        };
        const auto masked = to_bitmask(sparse);
        CHECK(to_sparse(masked) == sparse);
        std::vector<std::byte> raw(sparse.kept() * sizeof(A) + 1);
        std::memcpy(raw.data() + 1, sparse.values.data(), sparse.kept() * sizeof(A));
        auto viewed = detail::view_entries(masked, std::pmr::get_default_resource());
        viewed.view.values = raw.data() + 1;
        const auto round_trip = [&](const auto& entries) {
            std::vector<T> live = base, saved(sparse.kept());
            apply(cpu{.threads = 3}, entries, live, saved, -0.7);
            CHECK(same(live, expected));
            undo(cpu{.threads = 2}, entries, saved, live);
            CHECK(same(live, base));
            const auto returned = apply(cpu{}, entries, live, -0.7);
            CHECK(same(live, expected));
            undo(cpu{}, entries, returned, live);
            CHECK(same(live, base));
            std::vector<T> small(sparse.kept() + 1);
            CHECK_THROWS_AS(apply(cpu{}, entries, live, small), invalid_argument);
            CHECK_THROWS_AS(undo(cpu{}, entries, small, live), invalid_argument);
            CHECK(same(live, base));
        };
        round_trip(sparse);
        round_trip(masked);
        round_trip(viewed.view);
    }
}

TEST_CASE("a bitmask that breaks its promises is refused with a sentence")
{
    std::vector<float> live(21);
    const auto refused = [&](const bitmask_vector<float>& bad, const char* words) {
        CHECK_THROWS_WITH_AS((void)apply(cpu{}, bad, live), words, invalid_argument);
    };
    refused({{21}, {0, 0}, {}}, "a bitmask of 2 bytes for 21 elements; expected 3");
    refused({{21}, {0, 0, 0x20}, {1}}, "a bitmask sets bit 21 of 21");
    refused({{21}, {3, 0, 0}, {1}}, "a bitmask sets 2 bits for 1 values");
    CHECK(live == std::vector<float>(21));
}

TEST_CASE("a sparse vector that breaks its promises is refused with a sentence")
{
    std::vector<float> live(21);
    const auto refused = [&](const sparse_vector<float>& bad, const char* words) {
        CHECK_THROWS_WITH_AS((void)apply(cpu{}, bad, live), words, invalid_argument);
    };
    refused({{21}, {3, 4}, {1}}, "delta of tensor 'values' has 1 values for 2 indices");
    refused({{21}, {3, 21}, {1, 2}}, "delta of tensor 'values' has index 21; the tensor has 21 elements");
    refused({{21}, {4, 3}, {1, 2}}, "delta of tensor 'values' has index 3 after 4; indices must ascend");
    refused({{21}, {4, 4}, {1, 2}}, "delta of tensor 'values' has index 4 after 4; indices must ascend");
    const sparse_vector<float> good{{7, 3}, {4}, {1}};
    std::vector<float> longer(22);
    CHECK_THROWS_WITH_AS((void)apply(cpu{}, good, longer),
        "tensor 'values' has 22 elements; the delta is for shape [7, 3]", shape_mismatch);
    CHECK(live == std::vector<float>(21));
    CHECK(longer == std::vector<float>(22));
}

TEST_CASE("a view of other values than the weights take is refused")
{
    const sparse_vector<double> wide{{4}, {1}, {2}};
    const auto viewed = detail::view_entries(wide, std::pmr::get_default_resource());
    std::vector<float> live(4);
    CHECK_THROWS_WITH_AS((void)apply(cpu{}, viewed.view, live),
        "tensor 'values' has dtype F32; the delta holds F64 values", dtype_mismatch);
    const sparse_vector<float> narrow{{4}, {1}, {2}};
    const auto narrow_view = detail::view_entries(narrow, std::pmr::get_default_resource());
    std::vector<double> wide_live(4);
    CHECK_THROWS_WITH_AS((void)apply(cpu{}, narrow_view.view, wide_live),
        "tensor 'values' has dtype F64; the delta holds F32 values", dtype_mismatch);
}

TEST_CASE("a view goes through the entries of any range of elements, from indices and from bits")
{
    sparse_vector<float> sparse{{3, 70'001}, {}, {}};
    for (std::uint64_t i = 1; i < 210'003; i += 1 + i % 97) { sparse.indices.push_back(i); }
    sparse.values.resize(sparse.kept());
    const auto masked = to_bitmask(sparse);
    sparse_vector<float> wide = sparse; // the same entries, their indices in eight bytes each
    wide.indices = index_list(sparse.kept(), std::uint64_t{1} << 40);
    for (std::size_t e = 0; e < sparse.kept(); ++e) {
        const std::uint64_t place = sparse.indices[e];
        wide.indices.store(e, &place, 1);
    }
    const auto memory = std::pmr::get_default_resource();
    const auto from_bits = detail::view_entries(masked, memory), from_indices = detail::view_entries(sparse, memory),
               from_wide = detail::view_entries(wide, memory);
    CHECK(from_wide.view.wide_indices);
    using numbers = std::vector<std::pair<std::uint64_t, std::uint64_t>>;
    for (const std::uint64_t from : {0, 1, 7, 8, 65'535, 65'536, 65'537, 131'080, 210'002}) {
        for (const std::uint64_t to : {0, 1, 9, 65'536, 65'540, 140'000, 210'003}) {
            CAPTURE(from);
            CAPTURE(to);
            numbers expected;
            for (std::size_t e = 0; e < sparse.kept(); ++e) {
                const std::uint64_t place = sparse.indices[e];
                if (place >= from && place < to) { expected.emplace_back(place, e); }
            }
            for (const auto* viewed : {&from_bits, &from_indices, &from_wide}) {
                numbers found;
                viewed->view.for_each(from, to, [&](auto place, auto entry) { found.emplace_back(place, entry); });
                CHECK(found == expected);
            }
        }
    }
}

TEST_CASE("a delta that does not fit a model is refused by the tensor's name, and nothing is changed")
{
    std::vector<float> first(21, 1.0f), second(4, 1.0f);
    std::vector<double> wide(4, 1.0);
    const model_ref model{{"a", as_tensor(as_view(first), {3, 7})}, {"b", as_tensor(as_view(second), {4})},
        {"w", as_tensor(as_view(wide), {4})}};
    const sparse_vector<float> good{{3, 7}, {2}, {5}};
    const auto refused = [&](const sparse_model& delta, const char* words, auto kind) {
        CHECK_THROWS_WITH_AS((void)apply(cpu{}, delta, model), words, typename decltype(kind)::type);
        CHECK_THROWS_WITH_AS((void)saved_bytes(delta, model), words, typename decltype(kind)::type);
        CHECK(first == std::vector<float>(21, 1.0f));
        CHECK(second == std::vector<float>(4, 1.0f));
        CHECK(wide == std::vector<double>(4, 1.0));
    };
    refused({{"a", good}, {"c", sparse_vector<float>{{4}, {1}, {2}}}},
        "tensor 'c' of the delta is missing in the model", std::type_identity<invalid_argument>{});
    refused({{"a", good}, {"b", sparse_vector<float>{{2, 2}, {1}, {2}}}},
        "tensor 'b' has shape [4]; the delta is for shape [2, 2]", std::type_identity<shape_mismatch>{});
    refused({{"a", good}, {"w", sparse_vector<float>{{4}, {1}, {2}}}},
        "tensor 'w' has dtype F64; the delta holds F32 values", std::type_identity<dtype_mismatch>{});
    refused({{"a", good}, {"b", sparse_vector<double>{{4}, {1}, {2}}}},
        "tensor 'b' has dtype F32; the delta holds F64 values", std::type_identity<dtype_mismatch>{});

    const sparse_model delta{{"a", good}, {"w", sparse_vector<double>{{4}, {0, 3}, {2, 3}}}};
    CHECK(kept_entries(delta) == 3);
    CHECK(saved_bytes(delta, model) == 8 + 16); // of each tensor whole eights
    alignas(8) std::array<std::byte, 32> room{};
    CHECK_THROWS_WITH_AS(apply(cpu{}, delta, model, std::span(room)),
        "the saved words of this delta take 24 bytes (see saved_bytes()), not 32: they do not belong to it",
        invalid_argument);
    CHECK_THROWS_WITH_AS(apply(cpu{}, delta, model, std::span(room).subspan(4, 24)),
        "memory for saved words must be aligned to 8 bytes", invalid_argument);
    apply(cpu{}, delta, model, std::span(room).first(24), 2.0);
    CHECK(first[2] == 11);
    CHECK(wide == std::vector<double>{5, 1, 1, 7});
    CHECK_THROWS_AS(undo(cpu{}, delta, std::span<const std::byte>(room).subspan(4, 24), model), invalid_argument);
    CHECK(first[2] == 11);
    undo(cpu{}, delta, std::span<const std::byte>(room).first(24), model);
    CHECK(first == std::vector<float>(21, 1.0f));
    CHECK(wide == std::vector<double>(4, 1.0));
}

TEST_CASE("saved words and sparse vectors come from the policy's memory")
{
    std::array<std::byte, 4096> room;
    std::pmr::monotonic_buffer_resource memory(room.data(), room.size(), std::pmr::null_memory_resource());
    const auto inside = [&](const void* place) {
        return place >= static_cast<const void*>(room.data())
            && place < static_cast<const void*>(room.data() + room.size());
    };
    const cpu policy{.threads = 1, .executor = {}, .memory = &memory, .progress = {}};
    std::vector<float> live(21);
    const sparse_vector<float> sparse{{3, 7}, {0, 7, 8, 20}, {1, 2, 3, 4}};
    CHECK(inside(apply(policy, sparse, live).data()));
    const sparse_model delta{{"w", sparse}};
    const model_ref model{{"w", as_tensor(as_view(live), {3, 7})}};
    const saved_words saved = apply(policy, delta, model);
    CHECK(inside(saved.bytes().data()));
    CHECK(inside(to_bitmask(sparse, &memory).values.data()));
    CHECK(inside(to_sparse(to_bitmask(sparse), &memory).indices.data()));
    undo(policy, delta, saved, model);
    CHECK(live[7] == 2); // once applied, once more, and once undone
}
