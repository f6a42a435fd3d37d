// The operators, as schemas.cpp registers them. Their schemas there say what each computes.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace lightning_fastmoe {

using torch::stable::Tensor;

// routing.cu
std::tuple<Tensor, Tensor, Tensor> route(const Tensor& logits,
                                         const std::optional<Tensor>& selection_bias, int64_t top_k,
                                         bool normalize, bool sigmoid);
Tensor route_backward(const Tensor& logits, const Tensor& weights, const Tensor& expert_ids,
                      const std::optional<Tensor>& d_scores, const std::optional<Tensor>& d_weights,
                      bool normalize, bool sigmoid);

// balancing.cu
std::tuple<Tensor, Tensor> balancing_losses(const Tensor& scores, const Tensor& logits,
                                            const Tensor& counts, double of_balancing,
                                            double of_z);
std::tuple<Tensor, Tensor> balancing_losses_backward(
    const Tensor& logits, const Tensor& share, const std::optional<Tensor>& d_balancing,
    const std::optional<Tensor>& d_z, const std::optional<Tensor>& d_total, double of_balancing,
    double of_z);

// sort.cu
std::tuple<Tensor, Tensor, Tensor, Tensor> sort_by_expert(const Tensor& expert_ids,
                                                          int64_t num_experts, int64_t kept);

// permute.cu
Tensor permute_rows(const Tensor& x, const Tensor& inverse, int64_t top_k);
Tensor sum_rows(const Tensor& rows, const Tensor& inverse, const std::optional<Tensor>& weights,
                int64_t top_k, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& offsets);
std::tuple<Tensor, Tensor> unpermute_backward(const Tensor& grad, const Tensor& y,
                                              const Tensor& weights, const Tensor& inverse);

// activation.cu
Tensor activation(const Tensor& h, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& offsets, std::string name);
Tensor activation_backward_(const Tensor& h, const Tensor& d_act, const Tensor& weights,
                            const std::optional<Tensor>& order, const std::optional<Tensor>& bias,
                            const std::optional<Tensor>& offsets, std::string name);

// zero_empty.cu
void zero_empty_experts_(const Tensor& grad, const Tensor& tokens_per_expert);

// adam_step.cu
void adam_step_(std::vector<Tensor> gradients, const Tensor& master, const Tensor& mean,
                const Tensor& mean_square, const Tensor& weights, const Tensor& step,
                const std::optional<Tensor>& scale, const std::optional<Tensor>& blocked,
                double lr, double beta1, double beta2, double eps, double weight_decay,
                bool decoupled);

// dequantize.cu
void dequantize_groups_(const Tensor& codes, const Tensor& scales, const Tensor& out, int64_t bits);

// exchange/push.cu
void exchange_push(const Tensor& rows, const std::optional<Tensor>& order, const Tensor& ends,
                   int64_t divisor, std::vector<Tensor> memory, int64_t rank, int64_t at,
                   int64_t most, int64_t bulk_blocks);
void exchange_send(std::vector<Tensor> parts, const std::optional<Tensor>& order,
                   const Tensor& ends, std::vector<int64_t> divisors, std::vector<Tensor> memory,
                   int64_t rank, std::vector<int64_t> at, int64_t most, std::vector<Tensor> flags,
                   int64_t flags_at, int64_t value);

// exchange/plan.cu
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> exchange_plan(
    const Tensor& chosen, const Tensor& where, const Tensor& weights, int64_t ranks);

// exchange/arrival.cu
std::tuple<Tensor, Tensor, Tensor, Tensor> exchange_receive(
    const Tensor& memory, int64_t at, int64_t block_bytes, int64_t row_bytes,
    std::vector<int64_t> counts, int64_t packed_at, int64_t packed_block_bytes, int64_t slots,
    int64_t num_local);
std::tuple<Tensor, Tensor, Tensor, Tensor> exchange_receive_ahead(
    const Tensor& memory, int64_t at, int64_t block_bytes, int64_t row_bytes, int64_t rows,
    int64_t packed_at, int64_t packed_block_bytes, int64_t slots, int64_t num_local,
    const Tensor& control, const Tensor& where, int64_t rank, int64_t ranks,
    std::vector<int64_t> flags, std::vector<int64_t> table, int64_t capacity, int64_t most,
    int64_t pairs);
Tensor exchange_sums(const Tensor& rows, const Tensor& inverse, const Tensor& offsets,
                     int64_t most);
Tensor exchange_slots(const Tensor& memory, int64_t at, int64_t block_bytes, const Tensor& inverse,
                      const Tensor& offsets, const Tensor& owner);

// exchange/counts.cu
void exchange_announce(const Tensor& first, const Tensor& second, int64_t last,
                       std::vector<int64_t> header, int64_t size, std::vector<Tensor> memory,
                       int64_t rank, int64_t at, int64_t flags_at, int64_t value, int64_t stream);
void exchange_await(std::vector<Tensor> memory, int64_t rank, int64_t flags_at, int64_t value,
                    int64_t at, int64_t block_bytes, const Tensor& found, const Tensor& report,
                    double seconds, int64_t stream);

// exchange/flags.cu
void exchange_set_flags(std::vector<Tensor> memory, int64_t rank, int64_t at, int64_t value);
void exchange_wait(std::vector<Tensor> memory, int64_t rank, int64_t at, int64_t value,
                   const Tensor& report, double seconds, bool fatal);

// exchange/sharded_layer.cpp
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> exchange_layer_start(
    const Tensor& x, const Tensor& chosen, const Tensor& where, const Tensor& weights,
    std::vector<Tensor> control, std::vector<Tensor> memory, int64_t rank,
    std::vector<int64_t> counts, std::vector<int64_t> header, std::vector<int64_t> rows,
    const Tensor& found, const Tensor& report, double seconds, int64_t stream);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
exchange_layer_forward(std::vector<Tensor> control, const Tensor& memory, const Tensor& where,
                       const Tensor& up, const Tensor& down, int64_t rank, int64_t slots,
                       int64_t rows, int64_t pairs, std::vector<int64_t> place,
                       std::vector<int64_t> table, const Tensor& report, double seconds,
                       int64_t stream, std::string name, bool keep_h);
Tensor exchange_layer_combine(const Tensor& sums, const Tensor& ends, const Tensor& inverse,
                              const Tensor& offsets, std::vector<Tensor> control,
                              std::vector<Tensor> memory, int64_t rank, std::vector<int64_t> place,
                              const Tensor& report, double seconds);
std::tuple<Tensor, Tensor, Tensor, Tensor> exchange_layer_backward_(
    const Tensor& grad, const Tensor& pair_order, const Tensor& pair_inverse,
    const Tensor& pair_offsets, const Tensor& owner, std::vector<Tensor> control,
    std::vector<Tensor> memory, int64_t rank, std::vector<int64_t> there,
    std::vector<int64_t> back, std::vector<int64_t> counts, const Tensor& report, double seconds,
    int64_t stream, const Tensor& x, const Tensor& h, const Tensor& weights, const Tensor& up,
    const Tensor& down, const Tensor& order, const Tensor& inverse, const Tensor& offsets,
    std::string name, bool wants_up, bool wants_down);

// layer.cpp
std::tuple<Tensor, Tensor> expert_layer(const Tensor& x, const std::optional<Tensor>& weights,
                                        const Tensor& up, const Tensor& down,
                                        const std::optional<Tensor>& order,
                                        const std::optional<Tensor>& inverse, const Tensor& offsets,
                                        std::string name, bool keep_h, bool hopper);
std::tuple<Tensor, Tensor, Tensor, Tensor> expert_layer_backward_(
    const Tensor& grad, const Tensor& x, const Tensor& h, const Tensor& weights, const Tensor& up,
    const Tensor& down, const std::optional<Tensor>& order, const std::optional<Tensor>& inverse,
    const Tensor& tokens_per_expert, const Tensor& offsets, std::string name, bool wants_x,
    bool wants_up, bool wants_down, bool hopper, bool keep_h);

}  // namespace lightning_fastmoe
