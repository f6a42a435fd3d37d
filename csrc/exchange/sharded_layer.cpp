// A layer some of whose experts are other ranks', as four operators, so that launching its many
// short kernels is not limited by the Python interpreter: the host must not be the last to know
// what comes next. They are composed of the operators of this folder and of ../layer.cpp;
// lightning_fastmoe/distributed/symmetric makes the same passes step by step, and has the protocol.
//
// Groups of numbers are places in the ranks' memory, in bytes: see the schemas.
#include <array>
#include <exception>

#include "../checks.h"
#include "../hopper/ops.h"
#include "../ops.h"
#include "launches.h"

namespace lightning_fastmoe {
namespace {

using Numbers = std::vector<int64_t>;

template <size_t count>
std::array<int64_t, count> named(const Numbers& numbers, const char* op, const char* what) {
  STD_TORCH_CHECK(numbers.size() == count, op, ": ", what, " are ", count, " numbers, not ",
                  numbers.size());
  std::array<int64_t, count> found{};
  for (size_t i = 0; i < count; ++i) found[i] = numbers[i];
  return found;
}

Tensor first_rows(Tensor rows, int64_t count) { return torch::stable::narrow(rows, 0, 0, count); }

// The same bytes as elements of another type.
Tensor as_type(const Tensor& bytes, ScalarType dtype) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(bytes),
                                    torch::stable::detail::from(dtype)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::view", "dtype", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor as_bytes(const Tensor& rows) { return as_type(rows, ScalarType::Byte); }

int64_t bytes_of_row(const Tensor& like) {
  return like.size(like.dim() - 1) * static_cast<int64_t>(like.element_size());
}

// Rows of all ranks, with room for `most` of each, as a view: (ranks * most, width).
Tensor blocks_of(Tensor memory, int64_t at, int64_t rows, const Tensor& like) {
  const int64_t row_bytes = bytes_of_row(like);
  const Tensor bytes = torch::stable::narrow(memory, 0, at, rows * row_bytes);
  return as_type(torch::stable::view(bytes, {rows, row_bytes}), like.scalar_type());
}

// Where an error, a lack of memory for example, leaves the scope: waits for the copies on a stream.
// What they read is freed next, and the allocator, which knows of the current stream alone, would
// give its memory away under them.
class CopiedFirst {
 public:
  explicit CopiedFirst(cudaStream_t stream) : stream_(stream) {}
  CopiedFirst(const CopiedFirst&) = delete;
  CopiedFirst& operator=(const CopiedFirst&) = delete;
  ~CopiedFirst() {
    if (std::uncaught_exceptions() > before_) static_cast<void>(cudaStreamSynchronize(stream_));
  }

 private:
  cudaStream_t stream_;
  int before_ = std::uncaught_exceptions();
};

// Copies what came here back to where it came from, by the copy engines: rows [0, counts[0]) to
// rank 0, and so on. Multiprocessors have other work meanwhile.
void copy_back(const Ranks& ranks, const Tensor& rows, const Numbers& counts, int64_t at,
               int64_t row_bytes, cudaStream_t stream) {
  const auto* from = static_cast<const unsigned char*>(rows.data_ptr());
  Numbers begins(counts.size());
  for (size_t r = 1; r < counts.size(); ++r) begins[r] = begins[r - 1] + counts[r - 1];
  for (int i = 1; i <= ranks.count; ++i) {  // this rank's own last: they have no way to go
    const auto r = static_cast<size_t>((ranks.own + i) % ranks.count);
    if (counts[r] == 0) continue;
    STD_CUDA_CHECK(cudaMemcpyAsync(ranks.memory[r] + at, from + begins[r] * row_bytes,
                                   static_cast<size_t>(counts[r] * row_bytes),
                                   cudaMemcpyDeviceToDevice, stream));
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> exchange_layer_start(
    const Tensor& x, const Tensor& chosen, const Tensor& where, const Tensor& weights,
    std::vector<Tensor> control, std::vector<Tensor> memory, int64_t rank, Numbers counts,
    Numbers header, Numbers rows, const Tensor& found, const Tensor& report, double seconds,
    int64_t stream) {
  const char* op = "exchange_layer_start";
  const auto [needed, size, own_at, counts_flags_at, counts_value, table_at, block_bytes] =
      named<7>(counts, op, "counts");
  const auto [x_at, packed_at, most, flags_at, value] = named<5>(rows, op, "rows");
  const auto ranks = static_cast<int64_t>(control.size());
  auto plan = exchange_plan(chosen, where, weights, ranks);
  const auto& [order, inverse, offsets, owner, packed, of_experts, of_ranks] = plan;
  exchange_announce(of_experts, first_rows(of_ranks, ranks), needed, header, size, control, rank,
                    own_at, counts_flags_at, counts_value, stream);
  if (most > 0) {
    exchange_send({x, packed}, order, first_rows(offsets, ranks), {ranks, 1}, memory, rank,
                  {x_at, packed_at}, most, control, flags_at, value);
  } else {
    exchange_set_flags(control, rank, flags_at, value);
  }
  exchange_await(control, rank, counts_flags_at, counts_value, table_at, block_bytes, found, report,
                 seconds, stream);
  return plan;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
exchange_layer_forward(std::vector<Tensor> control, const Tensor& memory, const Tensor& where,
                       const Tensor& up, const Tensor& down, int64_t rank, int64_t slots,
                       int64_t rows, int64_t pairs, Numbers place, Numbers table,
                       const Tensor& report, double seconds, int64_t stream, std::string name,
                       bool keep_h) {
  const char* op = "exchange_layer_forward";
  const auto [at, block_bytes, packed_at, packed_block_bytes, flags_at, value, capacity, most] =
      named<8>(place, op, "rows' places");
  const auto [table_at, table_block_bytes, header_bytes, counts_flags_at, counts_value] =
      named<5>(table, op, "the table's places");
  STD_TORCH_CHECK(rank >= 0 && rank < static_cast<int64_t>(control.size()), op,
                  ": there is no rank ", rank);
  const int64_t held = up.size(0);
  const DeviceGuard guard(memory.get_device_index());
  follow(current_stream(up), reinterpret_cast<cudaStream_t>(stream));  // it waits for the counts
  exchange_wait(control, rank, flags_at, value, report, seconds, false);
  auto [bytes, weights, keys, ends] = exchange_receive_ahead(
      memory, at, block_bytes, bytes_of_row(up), rows, packed_at, packed_block_bytes, slots, held,
      control[static_cast<size_t>(rank)], where, rank, static_cast<int64_t>(control.size()),
      {counts_flags_at, counts_value, flags_at, value},
      {table_at, table_block_bytes, header_bytes}, capacity, most, pairs);
  const Tensor x = as_type(bytes, up.scalar_type());
  auto [order, inverse, tokens_per_expert, offsets] =
      sort_by_expert(torch::stable::view(keys, {rows * slots}), held + 1, held);
  order = first_rows(order, pairs);
  offsets = first_rows(offsets, held);
  auto [sums, h] =
      expert_layer(x, weights, up, down, order, inverse, offsets, name, keep_h, true);
  return {x, weights, ends, order, inverse, first_rows(tokens_per_expert, held), offsets, sums, h};
}

Tensor exchange_layer_combine(const Tensor& sums, const Tensor& ends, const Tensor& inverse,
                              const Tensor& offsets, std::vector<Tensor> control,
                              std::vector<Tensor> memory, int64_t rank, Numbers place,
                              const Tensor& report, double seconds) {
  const auto [own_at, at, most, flags_at, value] =
      named<5>(place, "exchange_layer_combine", "rows' places");
  exchange_send({as_bytes(sums)}, std::nullopt, ends, {1}, memory, rank, {own_at}, most, control,
                flags_at, value);
  exchange_wait(control, rank, flags_at, value, report, seconds, true);
  const auto all = static_cast<int64_t>(control.size()) * most;
  return exchange_sums(blocks_of(memory[static_cast<size_t>(rank)], at, all, sums), inverse,
                       offsets, most);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> exchange_layer_backward_(
    const Tensor& grad, const Tensor& pair_order, const Tensor& pair_inverse,
    const Tensor& pair_offsets, const Tensor& owner, std::vector<Tensor> control,
    std::vector<Tensor> memory, int64_t rank, Numbers there, Numbers back, Numbers counts,
    const Tensor& report, double seconds, int64_t stream, const Tensor& x, const Tensor& h,
    const Tensor& weights, const Tensor& up, const Tensor& down, const Tensor& order,
    const Tensor& inverse, const Tensor& offsets, std::string name, bool wants_up,
    bool wants_down) {
  const char* op = "exchange_layer_backward_";
  const auto [there_own_at, there_at, there_block, there_most, there_flags_at, there_value] =
      named<6>(there, op, "the places of the sums' gradients");
  const auto [back_own_at, back_weights_own_at, back_at, back_weights_at, back_weights_block,
              back_most, back_flags_at, back_value] =
      named<8>(back, op, "the places of the tokens' gradients");
  const auto ranks = static_cast<int64_t>(control.size());
  const Ranks all = check_ranks(memory, rank, op), flag_ranks = check_ranks(control, rank, op);
  STD_TORCH_CHECK(counts.size() == control.size(), op, ": as many counts as ranks");
  const Tensor& own = memory[static_cast<size_t>(rank)];
  const Tensor ends = first_rows(pair_offsets, ranks);

  exchange_send({as_bytes(grad)}, pair_order, ends, {ranks}, memory, rank, {there_own_at},
                there_most, control, there_flags_at, there_value);
  exchange_wait(control, rank, there_flags_at, there_value, report, seconds, true);
  Tensor d_rows, d_row_weights, d_up = torch::stable::new_empty(x, {0}),
                                d_down = torch::stable::new_empty(x, {0});
  {
    auto [bytes, no_weights, no_keys, no_ends] = exchange_receive(
        own, there_at, there_block, bytes_of_row(grad), counts, there_at, 0, 0, 0);
    const Tensor d_sums = as_type(bytes, grad.scalar_type());
    Tensor weighted, d_h = h;
    std::tie(weighted, d_row_weights) =
        hopper::backward_activation(d_sums, order, offsets, down, h, d_h, weights, name);
    // Before the tokens' gradients, because memory of both sides' rows is free afterwards.
    if (wants_down) {
      d_down = hopper::weight_gradient(d_sums, order, weights.size(1), weighted, offsets, false);
    }
  }
  {
    const Tensor rows =
        hopper::rows_product(h, offsets, up, false, std::nullopt, std::nullopt);
    d_rows = sum_rows(rows, inverse, std::nullopt, weights.size(1), std::nullopt, std::nullopt);
  }

  // These travel while the gradients of up are computed.
  const DeviceGuard guard(own.get_device_index());
  const auto aside = reinterpret_cast<cudaStream_t>(stream);
  const CopiedFirst copied_first(aside);
  follow(aside, current_stream(own));
  for (const int64_t count : counts) {
    STD_TORCH_CHECK(count <= back_most, op, ": ", count, " rows are more than there is room for");
  }
  const int64_t row_bytes = bytes_of_row(d_rows), weight_bytes = bytes_of_row(d_row_weights);
  check_range(own, back_own_at, back_most * row_bytes, op);
  check_range(own, back_weights_own_at, back_most * weight_bytes, op);
  copy_back(all, d_rows, counts, back_own_at, row_bytes, aside);
  copy_back(all, d_row_weights, counts, back_weights_own_at, weight_bytes, aside);
  set_flags(flag_ranks, back_flags_at, back_value, aside, op);

  if (wants_up) d_up = hopper::weight_gradient(x, order, weights.size(1), h, offsets, true);
  // This rank's own flag is among those: from here on d_rows has been copied.
  exchange_wait(control, rank, back_flags_at, back_value, report, seconds, true);
  Tensor d_x = exchange_sums(blocks_of(own, back_at, ranks * back_most, d_rows), pair_inverse,
                             pair_offsets, back_most);
  Tensor d_weights = exchange_slots(own, back_weights_at, back_weights_block, pair_inverse,
                                    pair_offsets, owner);
  return {d_x, d_weights, d_up, d_down};
}

}  // namespace lightning_fastmoe
