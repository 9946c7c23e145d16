// Sparse vectors: index lists, checks, and entries added in place and taken back, from indices and from bits.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/select/sparse.hpp>

#include <doctest/doctest.h>

#include <array>
#include <cstring>
#include <iterator>
#include <memory_resource>
#include <random>
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

TEST_CASE("a view of other values than the weights take is refused")
{
    const sparse_vector<double> wide{{4}, {1}, {2}};
    const auto viewed = detail::view_entries(wide, std::pmr::get_default_resource());
    std::vector<float> live(4);
    CHECK_THROWS_WITH_AS((void)apply(cpu{}, viewed.view, live),
        "tensor 'values' has dtype F32; the delta holds F64 values", dtype_mismatch);
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
