// Every public type of the CPU's rooms, declared: for headers that name the library's types and need no more of them.
// SPDX-License-Identifier: Apache-2.0
//
// Definitions are in the header of each type, `taskvec/<room>/…`; default template arguments are here. A program's own
// header includes this one, and its source files what they use. It includes a few small headers of the standard
// library (and, where TASKVEC_MORE_STORAGE is defined, that header).
//
//     #include <taskvec/fwd.hpp>
//
//     class adapters_on_disk {
//         taskvec::lora_update<float> read(const taskvec::cpu& policy) const;
//         taskvec::matrix<double>* scratch;
//     };
//
// Not declared, because their constraints need definitions: disentanglement_meter (analysis/disentanglement.hpp),
// dlpack_handle (interop/dlpack.hpp) and tensor_group (methods/by_tensor.hpp).
#pragma once

#include <taskvec/core/config.hpp>
#include <taskvec/core/storage_list.hpp>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#if defined(TASKVEC_MORE_STORAGE)
#include TASKVEC_MORE_STORAGE
#endif

namespace taskvec::inline TASKVEC_ABI {

// Storage types and memory spaces: what the constraints below ask for.

#if !defined(TASKVEC_MORE_STORAGE)
/// The storage types that a program adds (TASKVEC_MORE_STORAGE).
using more_storage_types = storage_list<>;
#endif

namespace detail {
template <class First, class Second>
struct joined_lists;
template <class... A, class... B>
struct joined_lists<storage_list<A...>, storage_list<B...>> {
    using type = storage_list<A..., B...>;
};

template <class T, class List>
inline constexpr bool is_listed = false;
template <class T, class... Listed>
inline constexpr bool is_listed<T, storage_list<Listed...>> = (std::same_as<T, Listed> || ...);
} // namespace detail

/// Every storage type.
using storage_types = typename detail::joined_lists<own_storage_types, more_storage_types>::type;

/// The types that the algorithms compute with when tensors are stored in them: f64, f32, bf16, f16, and what the
/// program adds.
template <class T>
concept storage_element = detail::is_listed<T, storage_types>;

/// Where memory is: part of the type of what views it.
enum class memory_space : std::uint8_t { host, device };

template <class T>
struct dual;

namespace detail {
template <class T>
inline constexpr bool is_dual = false;
template <class T>
inline constexpr bool is_dual<dual<T>> = true;
} // namespace detail

/// What derivatives are taken of: float, double, or a dual number over one of them (nested for higher derivatives).
template <class T>
concept differentiable_scalar = std::same_as<T, float> || std::same_as<T, double> || detail::is_dual<T>;

// core/
template <class T>
class call_allocator;
template <class Signature>
class callback;
template <class Signature>
class function_ref;
enum class dtype : std::uint8_t;
enum class error_kind;
enum class error_code : std::uint16_t;
struct error_code_entry;
class error;
class invalid_argument;
class shape_mismatch;
class dtype_mismatch;
class nonfinite_error;
class format_error;
class io_error;
class backend_error;
class cancelled;
class xxh64;
enum class instruction_set : std::uint8_t;
enum class matrix_order : std::uint8_t;
template <class T, memory_space S = memory_space::host>
    requires storage_element<std::remove_const_t<T>>
class matrix_view;
template <storage_element T, memory_space S = memory_space::host>
class matrix;
struct option_axis;
struct option_details;
template <class Options, class Value>
struct option_row;
template <class Options, class Inner, std::size_t N>
struct inner_options;
template <class... Rows>
struct option_table;
template <class Options>
struct option_preset;
template <class Options>
struct options_of;
template <class Enum>
struct enum_words;
template <class Enum>
struct enum_word;
enum class option_kind : std::uint8_t;
struct option_description;
template <arithmetic_element A, int bytes>
struct pack_mask;
template <arithmetic_element A, int bytes>
struct pack_words;
template <arithmetic_element A, int bytes>
struct pack;
enum class progress_unit : std::uint8_t;
struct progress_event;
enum class nonfinite : std::uint8_t;
struct cpu;
class device_memory_resource;
class gpu_context;
struct gpu;
class random_stream;
enum class word_order : std::uint8_t;
struct tensor_spec;
class tensor_sink;
class memory_sink;
template <class T>
struct same_bits_as;
template <class T>
struct storage_traits;
template <storage_element T>
struct pack_conversion;
template <storage_element T, int bytes>
struct stored_pack;
template <class Byte>
    requires std::is_void_v<Byte>
struct basic_tensor_ref;
template <class Ref>
class basic_model;
template <class T, memory_space S>
    requires storage_element<std::remove_const_t<T>>
class view;
template <class X>
struct view_traits;

/// Elements in host memory.
template <class T>
using host_view = view<T, memory_space::host>;
/// Elements in device memory.
template <class T>
using device_view = view<T, memory_space::device>;
/// A matrix in device memory.
template <class T>
using device_matrix_view = matrix_view<T, memory_space::device>;
/// A tensor that may be written. See basic_tensor_ref.
using tensor_ref = basic_tensor_ref<void>;
/// A tensor that is read. See basic_tensor_ref.
using const_tensor_ref = basic_tensor_ref<const void>;
/// A model that may be written. See basic_model.
using model_ref = basic_model<tensor_ref>;
/// A model that is read. See basic_model.
using const_model_ref = basic_model<const_tensor_ref>;

// linalg/
template <storage_element T, memory_space S = memory_space::host>
struct factor_pair;
template <arithmetic_element T, memory_space S = memory_space::host>
struct factored_svd_result;
template <arithmetic_element T, memory_space S = memory_space::host>
struct stacked_factors;
template <arithmetic_element T, memory_space S = memory_space::host>
struct qr_factors;
struct small_svd_result;
struct randomized_svd_options;
template <arithmetic_element T, memory_space S = memory_space::host>
struct randomized_svd_result;
struct decompose_randomized;
struct rank_choice;
template <arithmetic_element T, memory_space S = memory_space::host>
struct svd_result;
template <arithmetic_element T>
struct truncated_svd_result;
struct decompose_exactly;

// models/
class operand_source;
struct row_run;
class selected_rows;
enum class missing_tensors : std::uint8_t;
enum class overflow : std::uint8_t;
struct model_options;
struct aligned_tensor;
struct copied_tensor;
struct tensor_chunk;
class chunk_list;
struct tensor_range;
class aligned_models;
template <arithmetic_element A>
class row_block;
class block_workspace;
struct chunk_range;
struct companion;
class overflow_guard;
struct operand_pair;
enum class weight_layout : std::uint8_t;

// select/
class index_list;
template <arithmetic_element A>
struct sparse_vector;
template <arithmetic_element A>
struct bitmask_vector;
struct sparse_view;
class saved_words;
class sparse_sink;
class sparse_model_sink;
enum class scope : std::uint8_t;
enum class trim_rule : std::uint8_t;
class task_shares;
class trim_thresholds;
template <arithmetic_element A>
struct top_k_threshold;

// statistics/
class fisher_accumulator;
class empirical_fisher_accumulator;
class expected_fisher_accumulator;
class gram_accumulator;

// methods/
struct keep_all;
template <arithmetic_element A>
struct acting_mean_body;
struct arcee_fusion_options;
template <arithmetic_element A>
struct chosen_body;
struct average_options;
struct checkpoint_average_options;
enum class checkpoint_schedule : std::uint8_t;
enum class decay_shape : std::uint8_t;
struct breadcrumbs_options;
struct breadcrumbs_ties_options;
enum class angles_between : std::uint8_t;
template <arithmetic_element A>
struct combination_body;
class combination_method;
struct dare_options;
struct dare_ties_options;
struct della_options;
struct della_linear_options;
enum class rank_axis : std::uint8_t;
class row_pieces;
enum class disjoint_merge : std::uint8_t;
enum class drop_rescale : std::uint8_t;
struct election_weights;
struct election_counts;
template <arithmetic_element A, class Rule>
struct sign_election_body;
template <arithmetic_element A, class Rule>
struct unit_election_body;
template <arithmetic_element A, class Rule = keep_all>
struct kept_sum_body;
class kept_sum;
struct fisher_options;
template <arithmetic_element A>
struct fisher_body;
template <arithmetic_element A>
struct keep_between_of_tensor;
class keep_between;
template <arithmetic_element A>
struct keep_random_of_tensor;
class keep_random;
template <arithmetic_element A>
struct keep_ranked_of_tensor;
class keep_ranked;
template <arithmetic_element A>
struct keep_top_of_tensor;
class keep_top;
template <arithmetic_element A>
struct mean_body;
template <arithmetic_element A>
struct pair_body;
template <arithmetic_element A>
struct scaled_body;
template <class Options>
class method;
struct merge_report;
struct merge_tally;
struct elementwise_method;
struct general_method;
struct karcher_options;
struct model_stock_options;
struct multi_slerp_options;
struct nearswap_options;
template <arithmetic_element A>
struct nearswap_body;
struct nuslerp_options;
class cpu_passes;
template <class Types>
class typed_passes;
class kept_numbers;
struct passthrough_options;
struct ram_options;
struct ram_plus_options;
struct regmean_options;
struct sce_options;
template <arithmetic_element A>
struct sce_body;
struct slerp_options;
struct task_arithmetic_options;
enum class zero_sign : std::uint8_t;
struct ties_options;
template <class Keep>
class sign_election_method;

// search/
struct lambda_grid;
struct lorahub_options;
struct lorahub_candidate;
struct lorahub_result;
struct lorahub_problem;
class lorahub_error;
struct cobyla;
struct subset_sweep_options;
struct sweep_row;
class sweep_table;
struct sweep_options;
template <storage_element T>
class task_space;
struct plane_options;

// analysis/
struct prediction_mismatch;
struct tensor_norms;
struct summary;

// adapters/
enum class sigma_side : std::uint8_t;
struct layer_report;
template <arithmetic_element T, memory_space S = memory_space::host>
struct adapter_result;
template <storage_element S>
class folded_update;
struct extract_options;
template <arithmetic_element T>
struct extract_result;
struct initialization_labels;
template <arithmetic_element T, memory_space S = memory_space::host>
struct lora_update;
struct linear_merge_options;
struct adapter_ties_options;
enum class peft_combination : std::uint8_t;
struct peft_merge_options;
struct initialized_adapter;
struct update_place;
struct weight_change;
template <arithmetic_element A>
class adapted_weight;
template <arithmetic_element A>
class adapted_stack;
class adapted_model;
struct fuse_options;
template <arithmetic_element T>
struct weighted_update;

// reuse/
struct peru_lora_options;
struct post_pruning_options;
struct sparse_addition_options;

// formats/
enum class index_check : std::uint8_t;
class checkpoint;
struct shard_name_parts;
struct shard_plan;
class resumable_shards;
class sharded_writer;
struct delta;
class delta_writer;
class delta_file;
struct file_kind;
class mapped_file;
enum class durability : std::uint8_t;
class atomic_file;
class directory_lock;
enum class existing_directory : std::uint8_t;
class output_directory;
class name_pattern;
struct peft_tensor;
template <arithmetic_element T>
struct peft_adapter;
class peft_writer;
struct peft_read_options;
enum class adapter_dialect : std::uint8_t;
struct parameter_slice;
template <arithmetic_element T>
struct adapted_module;
template <arithmetic_element T>
struct adapter_contents;
struct diffusion_module;
class diffusion_names;
struct module_match;
struct shape_check;
struct adapter_write_options;
struct adapter_loss;
struct written_adapter;
struct adapter_base_traits;
struct gguf_header;
struct gguf_target;
struct peft_write_options;
enum class quantisation : std::uint8_t;
struct layer_part;
struct quantised_layer;
struct unread_layer;
struct quantisation_hints;
class quantised_tensor;
class quantised_layers;
struct quantised_outputs;
class quantising_sink;
struct pytorch_contents;
struct safetensors_entry;
struct safetensors_header;
class safetensors_file;
struct safetensors_layout;
class safetensors_writer;
enum class statistics_kind : std::uint8_t;
struct statistics_info;
class statistics_file;

// jvp/
struct attention_options;
template <class T>
struct attention_gradient;
template <class T>
struct sum_gradient;
template <class T>
struct elementwise_product_gradient;
template <class Value>
struct jvp_result;
template <class T>
struct matmul_gradient;
struct matmul_wanted;
template <class T>
struct linear_gradient;
struct linear_wanted;
struct linearize_options;
template <class F, differentiable_scalar T>
class linearized;
template <class T>
struct linearized_lora_gradient;
template <arithmetic_element T>
class linearized_lora_layer;
template <class T>
struct lora_gradient;
struct lora_wanted;
template <arithmetic_element T>
class lora_layer;
struct normalization_options;
template <class T>
struct normalization_gradient;
template <class Value>
class named_values;
template <differentiable_scalar T>
class primal_tangent;

} // namespace taskvec::inline TASKVEC_ABI
