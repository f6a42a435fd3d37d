// The schemas of all operators, on torch's stable ABI: one build works with several torch versions.
//
// T tokens, D d_model, F d_ffn, E experts, K top_k, N = T*K rows in expert-major order.
// `inverse[p]` is the row of the flat (token, slot) pair p, `order[row]` the pair of a row.
#include <torch/csrc/stable/library.h>

#include "deadline.h"
#include "hopper/ops.h"
#include "ops.h"

STABLE_TORCH_LIBRARY(lightning_fastmoe, library) {
  // logits (T, E) fp32 -> scores (T, E) fp32, exp or sigmoid of the logits over a token's sum;
  // weights (T, K) fp32, exp or sigmoid of the chosen logits over their sum with normalize, else
  // the score or the bare sigmoid; expert_ids (T, K) int64, the K largest of softmax or sigmoid
  // plus selection_bias (E,), best first. Ratios are right even where each score would be zero in
  // fp32.
  library.def(
      "route(Tensor logits, Tensor? selection_bias, int top_k, bool normalize, bool sigmoid)"
      " -> (Tensor scores, Tensor weights, Tensor expert_ids)");
  // -> d_logits (T, E). An absent gradient is zero.
  library.def(
      "route_backward(Tensor logits, Tensor weights, Tensor expert_ids, Tensor? d_scores,"
      " Tensor? d_weights, bool normalize, bool sigmoid) -> Tensor");
  // scores, logits (T, E) fp32, counts (E,) int64, of chosen pairs -> values (3,): the load-balancing
  // loss, the z-loss, both zero where the coefficient is, and their sum with the coefficients;
  // share (E,), the counts as shares.
  library.def(
      "balancing_losses(Tensor scores, Tensor logits, Tensor counts, float of_balancing,"
      " float of_z) -> (Tensor values, Tensor share)");
  // The gradients of the three values, scalars or none -> d_scores (E,), the same for all tokens,
  // and d_logits (T, E), without rows if of_z is zero.
  library.def(
      "balancing_losses_backward(Tensor logits, Tensor share, Tensor? d_balancing, Tensor? d_z,"
      " Tensor? d_total, float of_balancing, float of_z) -> (Tensor d_scores, Tensor d_logits)");
  // expert_ids (N,) int64 -> order (N,), inverse (N,), tokens_per_expert (E,), all int64, and their
  // inclusive cumulative sum, offsets (E,) int32. inverse is -1 for pairs of experts from `kept` on.
  library.def(
      "sort_by_expert(Tensor expert_ids, int num_experts, int kept)"
      " -> (Tensor order, Tensor inverse, Tensor tokens_per_expert, Tensor offsets)");
  // x (T, D), inverse (N,) -> (N, D): out[inverse[t*K + k]] = x[t].
  library.def("permute_rows(Tensor x, Tensor inverse, int top_k) -> Tensor");
  // rows (N, D) -> (T, D): out[t] = sum_k weights[t, k] * rows[inverse[t*K + k]], in slot order, in
  // fp32; without weights a plain sum. A pair with -1 adds nothing, and a row may belong to no
  // pair. With bias (E, D) and offsets (E,), each row first gets its expert's.
  library.def(
      "sum_rows(Tensor rows, Tensor inverse, Tensor? weights, int top_k, Tensor? bias,"
      " Tensor? offsets) -> Tensor");
  // grad (T, D), y (N, D) -> d_y (N, D), d_weights (T, K): the gradients of the weighted sum.
  library.def(
      "unpermute_backward(Tensor grad, Tensor y, Tensor weights, Tensor inverse)"
      " -> (Tensor d_y, Tensor d_weights)");
  // h (N, 2F) or (N, F) -> (N, F). With bias (E, 2F) or (E, F) and offsets (E,), each row of h
  // first gets its expert's bias.
  library.def("activation(Tensor h, Tensor? bias, Tensor? offsets, str name) -> Tensor");
  // With w = weights[order[row]] (weights[row] without order) and A = act(h + bias): h becomes
  // w * d_act * act'(h + bias), d_act becomes w * A, d_weights[order[row]] = <A, d_act>.
  library.def(
      "activation_backward_(Tensor(a!) h, Tensor(b!) d_act, Tensor weights, Tensor? order,"
      " Tensor? bias, Tensor? offsets, str name) -> Tensor");
  // grad (E, ...): zeroes the slices of experts without tokens.
  library.def("zero_empty_experts_(Tensor(a!) grad, Tensor tokens_per_expert) -> ()");
  // The layer without biases: x (T, D), weights (T, K), up (E, 2F or F, D), down (E, D, F) -> out
  // (T, D), and the pre-activation h, which the backward needs (without keep_h it has no rows).
  // Without weights, order and inverse, x and out are rows in expert-major order. hopper selects
  // the grouped GEMMs of that architecture.
  library.def(
      "expert_layer(Tensor x, Tensor? weights, Tensor up, Tensor down, Tensor? order,"
      " Tensor? inverse, Tensor offsets, str name, bool keep_h, bool hopper)"
      " -> (Tensor out, Tensor h)");
  // Overwrites h, unless keep_h. Gradients that are not wanted have no elements. Without inverse,
  // weights are ones (N, 1).
  library.def(
      "expert_layer_backward_(Tensor grad, Tensor x, Tensor(a!) h, Tensor weights, Tensor up,"
      " Tensor down, Tensor? order, Tensor? inverse, Tensor tokens_per_expert, Tensor offsets,"
      " str name, bool wants_x, bool wants_up, bool wants_down, bool hopper, bool keep_h)"
      " -> (Tensor d_x, Tensor d_weights, Tensor d_up, Tensor d_down)");

  // The gradients of a flat partition (N,), in its order, are divided by scale and applied to the
  // fp32 master weights and moments by Adam; the weights become the master weights. step is this
  // step's number, from 1. The decay is AdamW's if decoupled, else it is added to the gradient.
  // Unless blocked, int64 (), is zero, nothing is updated.
  library.def(
      "adam_step_(Tensor[] gradients, Tensor(a!) master, Tensor(b!) mean, Tensor(c!) mean_square,"
      " Tensor(d!) weights, Tensor step, Tensor? scale, Tensor? blocked, float lr, float beta1,"
      " float beta2, float eps, float weight_decay, bool decoupled) -> ()");

  // out (..., D), D a multiple of 64, is the integers of codes, int8 (..., D) or with 4 bits
  // (..., D / 2), times the scales (..., D / 64) of groups, bf16 if out is, else fp32. With 4 bits,
  // byte j of a group has value j in its lower half and value j + 32 in the upper one.
  library.def(
      "dequantize_groups_(Tensor codes, Tensor scales, Tensor(a!) out, int bits) -> ()");

  // memory: (B,) bytes of each rank of a group, all mapped into this process; `rank` is this one.
  //
  // ends (R,) int32, where the rows of each rank end. Row order[i] / divisor of rows (n, w) (row i
  // without order), i < ends[R - 1], goes to the rank whose rows i is among, as its next row from
  // byte `at` on. A rank has room for `most`. With bulk_blocks, so many thread blocks move them by
  // bulk copies of compute capability 9.0; else all of the device's by loads and stores.
  library.def(
      "exchange_push(Tensor rows, Tensor? order, Tensor ends, int divisor, Tensor(a!)[] memory,"
      " int rank, int at, int most, int bulk_blocks) -> ()");
  // The parts of rows that go to the same ranks, each as by exchange_push, from byte at[i] on; then
  // this rank's flag of every rank, as by exchange_set_flags.
  library.def(
      "exchange_send(Tensor[] parts, Tensor? order, Tensor ends, int[] divisors,"
      " Tensor(a!)[] memory, int rank, int[] at, int most, Tensor(b!)[] flags, int flags_at,"
      " int value) -> ()");
  // chosen (T, K), E for dropped slots, where (2, E + 1), each expert's rank and number there, R
  // and -1 for dropped slots, weights (T, K) fp32. Of each (token, rank) pair the key is the rank
  // if one of the token's experts is there, else R -> the pairs sorted by key as by sort_by_expert:
  // order, inverse (T*R,), offsets, of_ranks (R + 1,); owner (T, K) int32, the rank of each slot;
  // packed (T*R, 8 K) bytes, the numbers of a pair's experts (int32, -1 for others) and the
  // weights, of pairs that are sent; of_experts (E,), the tokens of each expert.
  library.def(
      "exchange_plan(Tensor chosen, Tensor where, Tensor weights, int ranks)"
      " -> (Tensor order, Tensor inverse, Tensor offsets, Tensor owner, Tensor packed,"
      " Tensor of_experts, Tensor of_ranks)");
  // counts: the rows of each rank, in its block of the memory; and what came with them, packed
  // -> rows (S', row_bytes) bytes, by rank, weights (S', K) fp32, keys (S', K), expert numbers,
  // num_local for those of other ranks, ends (R,) int32, where each rank's rows end.
  library.def(
      "exchange_receive(Tensor memory, int at, int block_bytes, int row_bytes, int[] counts,"
      " int packed_at, int packed_block_bytes, int slots, int num_local)"
      " -> (Tensor rows, Tensor weights, Tensor keys, Tensor ends)");
  // exchange_receive before the host has seen the counts: the first kernel finds them in a table
  // of all ranks in control (this rank's flags and tables). rows, pairs: how many there are at
  // most. flags: the place and value of those of counts, and of rows; table: its place, the bytes
  // of a block and of its header, after which come E + R counts and the bytes that a rank needs,
  // at most `capacity`. Where any of that doesn't hold, nobody sent anything.
  library.def(
      "exchange_receive_ahead(Tensor memory, int at, int block_bytes, int row_bytes, int rows,"
      " int packed_at, int packed_block_bytes, int slots, int num_local, Tensor control,"
      " Tensor where, int rank, int ranks, int[] flags, int[] table, int capacity, int most,"
      " int pairs) -> (Tensor rows, Tensor weights, Tensor keys, Tensor ends)");
  // rows (R * most, D), what each rank has sent back for this rank's pairs; inverse, offsets of
  // exchange_plan -> (T, D), each token's sum in the order of ranks, accumulated in fp32.
  library.def(
      "exchange_sums(Tensor rows, Tensor inverse, Tensor offsets, int most) -> Tensor");
  // In each rank's block of the memory, K fp32 for each of this rank's pairs there
  // -> (T, K), each slot's element, zero for dropped slots.
  library.def(
      "exchange_slots(Tensor memory, int at, int block_bytes, Tensor inverse, Tensor offsets,"
      " Tensor owner) -> Tensor");
  // Writes to each rank's memory at byte `at`: the header, the sum and the checksum of what
  // follows, then first, second and, unless negative, last, padded to `size` numbers. Then sets
  // this rank's flag of every rank. On a stream, after what the current one has so far.
  library.def(
      "exchange_announce(Tensor first, Tensor second, int last, int[] header, int size,"
      " Tensor(a!)[] memory, int rank, int at, int flags_at, int value, int stream) -> ()");
  // As exchange_wait, on a stream; then copies the first numbers of each rank's block of this
  // rank's memory, from byte `at` on, into found (R, n), pinned host memory.
  library.def(
      "exchange_await(Tensor(a!)[] memory, int rank, int flags_at, int value, int at,"
      " int block_bytes, Tensor(b!) found, Tensor(c!) report, float seconds, int stream) -> ()");
  // Sets this rank's flag, among those at byte `at`, of every rank: after all that earlier kernels
  // of the stream wrote.
  library.def("exchange_set_flags(Tensor(a!)[] memory, int rank, int at, int value) -> ()");
  // Waits on the device until each rank has set its flag here to `value`. Where that doesn't
  // happen in time (0 seconds for no limit) or can't any more, says so in report (4,) int64, pinned
  // host memory, and tells the other ranks. Then, if fatal, traps.
  library.def(
      "exchange_wait(Tensor(a!)[] memory, int rank, int at, int value, Tensor(b!) report,"
      " float seconds, bool fatal) -> ()");

  // A layer between ranks; distributed/symmetric/operators.py has its passes. Ranks' memory is
  // given twice: that of flags and counts (control), and that of rows. Lists of numbers:
  //
  // counts: bytes that this rank's rows need, numbers of a vector with padding, where its vector
  // goes, the place and value of the flags; where the vectors of all ranks are, bytes of each.
  // rows: where x goes, and what comes with it, the rows there is room for (0: nothing is sent),
  // the place and value of the flags. The results are exchange_plan's.
  library.def(
      "exchange_layer_start(Tensor x, Tensor chosen, Tensor where, Tensor weights,"
      " Tensor(a!)[] control, Tensor(b!)[] memory, int rank, int[] counts, int[] header,"
      " int[] rows, Tensor(c!) found, Tensor(d!) report, float seconds, int stream)"
      " -> (Tensor order, Tensor inverse, Tensor offsets, Tensor owner, Tensor packed,"
      " Tensor of_experts, Tensor of_ranks)");
  // Waits for rows, then exchange_receive_ahead, sort_by_expert, and expert_layer with hopper.
  // place: where rows begin, bytes of a rank's, the same of what came with them, the place and
  // value of the flags, bytes of a rank, rows of a rank. table: where it is, the bytes of a block
  // and of its header, the place and value of its flags. `stream` waits for the table.
  library.def(
      "exchange_layer_forward(Tensor(a!)[] control, Tensor memory, Tensor where, Tensor up,"
      " Tensor down, int rank, int slots, int rows, int pairs, int[] place, int[] table,"
      " Tensor(b!) report, float seconds, int stream, str name, bool keep_h)"
      " -> (Tensor x, Tensor weights, Tensor ends, Tensor order, Tensor inverse,"
      " Tensor tokens_per_expert, Tensor offsets, Tensor sums, Tensor h)");
  // exchange_send, exchange_wait and exchange_sums. place: where this rank's rows go, where all
  // ranks' are, the rows there is room for of each, the place and value of the flags.
  library.def(
      "exchange_layer_combine(Tensor sums, Tensor ends, Tensor inverse, Tensor offsets,"
      " Tensor(a!)[] control, Tensor(b!)[] memory, int rank, int[] place, Tensor(c!) report,"
      " float seconds) -> Tensor");
  // The whole backward pass. The tokens' gradients travel, by the copy engines on `stream`, while
  // those of up are computed. pair_*, owner: of exchange_plan. there: where this rank's rows go,
  // where all ranks' are, the bytes of a rank's, the rows there is room for, the place and value of
  // the flags. back: where rows and weights' gradients go, where all ranks' are, the bytes of a
  // rank's of the latter, the rows there is room for, the place and value of the flags. counts: the
  // rows that each rank sent here. The others are those of expert_layer_backward_.
  library.def(
      "exchange_layer_backward_(Tensor grad, Tensor pair_order, Tensor pair_inverse,"
      " Tensor pair_offsets, Tensor owner, Tensor(a!)[] control, Tensor(b!)[] memory, int rank,"
      " int[] there, int[] back, int[] counts, Tensor(c!) report, float seconds, int stream,"
      " Tensor x, Tensor(d!) h, Tensor weights, Tensor up, Tensor down, Tensor order,"
      " Tensor inverse, Tensor offsets, str name, bool wants_up, bool wants_down)"
      " -> (Tensor d_x, Tensor d_weights, Tensor d_up, Tensor d_down)");

  // Which kernel of this process timed out, and what it waited for; "" if none. See deadline.h.
  library.def("stall_report() -> str");

  // The grouped GEMMs of compute capability 9.0: bf16 and fp16, contiguous, rows that are multiples
  // of 16 bytes, order (N,) int64, offsets (E,) int32. Whether this library has them for a device:
  library.def("hopper_available(int device) -> bool");
  // x (T, D), up (E, 2F, D) or (E, F, D), bias (E, 2F) or (E, F)
  // -> h (N, 2F) or (N, F), a = act(h) (N, F): h[row] = up[e] x[order[row] / top_k] (+ bias[e]).
  // Without keep_h, h has no rows.
  library.def(
      "hopper_up_forward(Tensor x, Tensor order, int top_k, Tensor offsets, Tensor up, Tensor? "
      "bias,"
      " str activation, bool keep_h) -> (Tensor h, Tensor a)");
  // grad (T, D), down (E, D, F), weights (T, K) or (T,) fp32. With d_act[row] = grad[order[row] /
  // K] @ down[e], w = weights[order[row]] and A = act(h): h becomes w * d_act * act'(h)
  // -> w * A (N, F), d_weights (T, K) with <A, d_act>.
  library.def(
      "hopper_backward_activation_(Tensor grad, Tensor order, Tensor offsets, Tensor down,"
      " Tensor(a!) h, Tensor weights, str activation) -> (Tensor weighted, Tensor d_weights)");
  // rows (N, k) -> (N, width): rows @ weight[e], (E, k, width), or if transposed (E, width, k).
  // With order, a permutation, row r is stored as row order[r] of the result, multiplied by
  // weights[order[r]], (N, 1) fp32, if there are any.
  library.def(
      "hopper_rows_product(Tensor rows, Tensor offsets, Tensor weight, bool transposed, Tensor? "
      "order, Tensor? weights) -> Tensor");
  // gathered (T, m), rows (N, n) -> (E, m, n), or if transposed (E, n, m): the sum over the rows of
  // e of the outer products of gathered[order[row] / top_k] and rows[row].
  library.def(
      "hopper_weight_gradient(Tensor gathered, Tensor order, int top_k, Tensor rows, Tensor "
      "offsets,"
      " bool transposed) -> Tensor");
  // x (R, C) fp32 as sums of bf16 numbers -> (R, parts, C'), C' the next multiple of 8, with zeros
  // from C on. Three parts are x, the smallest first; two are the larger ones of these; four are
  // the three and the largest once more.
  library.def("hopper_bf16_parts(Tensor x, int parts) -> Tensor");
  // x (T, D), weight (E, parts, D), 1 part or 3 -> x weight^T (T, E) fp32.
  library.def("hopper_router_logits(Tensor x, Tensor weight) -> Tensor");
  // x (T, D), gradient (T, P, E') of hopper_bf16_parts, of whose parts the first 2 or 3 and of whose
  // columns the first `experts` count -> gradient^T x (experts, D), fp32 or bf16.
  library.def(
      "hopper_router_weight_gradient(Tensor x, Tensor gradient, int parts, int experts,"
      " bool in_bf16) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lightning_fastmoe, CUDA, library) {
  library.impl("route", TORCH_BOX(&lightning_fastmoe::route));
  library.impl("route_backward", TORCH_BOX(&lightning_fastmoe::route_backward));
  library.impl("balancing_losses", TORCH_BOX(&lightning_fastmoe::balancing_losses));
  library.impl("balancing_losses_backward",
               TORCH_BOX(&lightning_fastmoe::balancing_losses_backward));
  library.impl("sort_by_expert", TORCH_BOX(&lightning_fastmoe::sort_by_expert));
  library.impl("permute_rows", TORCH_BOX(&lightning_fastmoe::permute_rows));
  library.impl("sum_rows", TORCH_BOX(&lightning_fastmoe::sum_rows));
  library.impl("unpermute_backward", TORCH_BOX(&lightning_fastmoe::unpermute_backward));
  library.impl("activation", TORCH_BOX(&lightning_fastmoe::activation));
  library.impl("activation_backward_", TORCH_BOX(&lightning_fastmoe::activation_backward_));
  library.impl("zero_empty_experts_", TORCH_BOX(&lightning_fastmoe::zero_empty_experts_));
  library.impl("expert_layer", TORCH_BOX(&lightning_fastmoe::expert_layer));
  library.impl("expert_layer_backward_", TORCH_BOX(&lightning_fastmoe::expert_layer_backward_));
  library.impl("adam_step_", TORCH_BOX(&lightning_fastmoe::adam_step_));
  library.impl("dequantize_groups_", TORCH_BOX(&lightning_fastmoe::dequantize_groups_));
  library.impl("exchange_push", TORCH_BOX(&lightning_fastmoe::exchange_push));
  library.impl("exchange_send", TORCH_BOX(&lightning_fastmoe::exchange_send));
  library.impl("exchange_plan", TORCH_BOX(&lightning_fastmoe::exchange_plan));
  library.impl("exchange_receive", TORCH_BOX(&lightning_fastmoe::exchange_receive));
  library.impl("exchange_receive_ahead", TORCH_BOX(&lightning_fastmoe::exchange_receive_ahead));
  library.impl("exchange_sums", TORCH_BOX(&lightning_fastmoe::exchange_sums));
  library.impl("exchange_slots", TORCH_BOX(&lightning_fastmoe::exchange_slots));
  library.impl("exchange_announce", TORCH_BOX(&lightning_fastmoe::exchange_announce));
  library.impl("exchange_await", TORCH_BOX(&lightning_fastmoe::exchange_await));
  library.impl("exchange_set_flags", TORCH_BOX(&lightning_fastmoe::exchange_set_flags));
  library.impl("exchange_wait", TORCH_BOX(&lightning_fastmoe::exchange_wait));
  library.impl("exchange_layer_start", TORCH_BOX(&lightning_fastmoe::exchange_layer_start));
  library.impl("exchange_layer_forward", TORCH_BOX(&lightning_fastmoe::exchange_layer_forward));
  library.impl("exchange_layer_combine", TORCH_BOX(&lightning_fastmoe::exchange_layer_combine));
  library.impl("exchange_layer_backward_", TORCH_BOX(&lightning_fastmoe::exchange_layer_backward_));
  namespace hopper = lightning_fastmoe::hopper;
  library.impl("hopper_up_forward", TORCH_BOX(&hopper::up_forward));
  library.impl("hopper_backward_activation_", TORCH_BOX(&hopper::backward_activation_));
  library.impl("hopper_rows_product", TORCH_BOX(&hopper::rows_product));
  library.impl("hopper_weight_gradient", TORCH_BOX(&hopper::weight_gradient));
  library.impl("hopper_bf16_parts", TORCH_BOX(&lightning_fastmoe::hopper::bf16_parts));
  library.impl("hopper_router_logits", TORCH_BOX(&lightning_fastmoe::hopper::router_logits));
  library.impl("hopper_router_weight_gradient",
               TORCH_BOX(&lightning_fastmoe::hopper::router_weight_gradient));
}

STABLE_TORCH_LIBRARY_IMPL(lightning_fastmoe, CompositeExplicitAutograd, library) {
  library.impl("hopper_available", TORCH_BOX(&lightning_fastmoe::hopper::available));
  library.impl("stall_report", TORCH_BOX(&lightning_fastmoe::stall_report));
}
