// icegrt._C: the list of operations, one per header; those on heads and pages are in bindings_decoding.cpp. Arrays are contiguous; the work runs without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <variant>

#include "addresses.hpp"
#include "arrays.hpp"
#include "balance.hpp"
#include "bindings.hpp"
#include "logit_rows.hpp"
#include "pack.hpp"
#include "rms_norm.hpp"
#include "scheduler_invariants.hpp"
#include "shaped_gae.hpp"
#include "swiglu.hpp"

namespace py = pybind11;
using namespace icegrt;

namespace {

py::dict py_pack(const py::array& prompt_tokens, const py::array& prompt_offsets, const py::array& response_tokens,
                 const py::array& response_offsets, const std::optional<py::array>& mask_offsets, int64_t tail_multiple,
                 int64_t tail_token, bool share_prompts) {
  PackInput in;
  in.prompt_tokens = view<int64_t>("prompt_tokens", prompt_tokens);
  in.prompt_offsets = view<int64_t>("prompt_offsets", prompt_offsets);
  in.response_tokens = view<int64_t>("response_tokens", response_tokens);
  in.response_offsets = view<int64_t>("response_offsets", response_offsets);
  in.has_mask = mask_offsets.has_value();
  if (in.has_mask) in.mask_offsets = view<int64_t>("mask_offsets", *mask_offsets);
  in.tail_multiple = tail_multiple;
  in.tail_token = tail_token;
  in.share_prompts = share_prompts;
  Packed packed;
  {
    py::gil_scoped_release release;
    packed = pack(in);
  }
  py::dict out;
  out["tokens_T"] = to_numpy(std::move(packed.tokens));
  out["positions_T"] = to_numpy(std::move(packed.positions));
  out["cu_seqlens"] = to_numpy(std::move(packed.cu_seqlens));
  out["cu_actions"] = to_numpy(std::move(packed.cu_actions));
  out["action_rows_A"] = to_numpy(std::move(packed.action_rows));
  out["last_rows_N"] = to_numpy(std::move(packed.last_rows));
  out["max_seqlen"] = packed.max_seqlen;
  out["tail_tokens"] = packed.tail_tokens;
  out["groups"] = packed.groups;
  out["cu_groups"] = to_numpy(std::move(packed.cu_groups));
  return out;
}

py::tuple py_balance(const py::array& lengths, const std::optional<py::array>& costs, int64_t token_budget, int64_t ranks,
                     int64_t round_to) {
  const Span<int64_t> length_view = view<int64_t>("lengths", lengths);
  const Span<int64_t> cost_view = costs ? view<int64_t>("costs", *costs) : length_view;
  Assignment assignment;
  {
    py::gil_scoped_release release;
    assignment = balance(length_view, cost_view, token_budget, ranks, round_to);
  }
  return py::make_tuple(assignment.n_micro_batches, to_numpy(std::move(assignment.order)),
                        to_numpy(std::move(assignment.offsets)), to_numpy(std::move(assignment.bin_tokens)));
}

using Optional = std::optional<py::array>;
using Lambda = std::variant<double, py::array>;  // of all sequences, or of each

template <typename T>
Decay<T> decay(const char* name, double gamma, const Lambda& lam) {
  if (const double* all = std::get_if<double>(&lam)) return {static_cast<T>(gamma * *all), static_cast<T>(gamma), {}};
  return {T(0), static_cast<T>(gamma), view<T>(name, std::get<py::array>(lam))};
}

template <typename T>
py::tuple py_shaped_gae(const py::array& score, const py::array& value, const py::array& logprob, const Optional& ref,
                         const py::array& cu_actions, const Optional& bootstrap, const Optional& mask,
                         const Optional& token_reward, py::array advantage, py::array returns, py::array reward,
                         py::array kl, Optional value_mask, const std::string& estimator, double kl_coef, double gamma,
                         const Lambda& lam, const std::optional<Lambda>& lam_value, int64_t threads) {
  GAEInput<T> in;
  in.score = view<T>("score_N", score);
  in.value = view<T>("value_A", value);
  in.logprob = view<T>("logprob_A", logprob);
  in.ref_logprob = view<T>("ref_logprob_A", ref);
  in.bootstrap = view<T>("bootstrap_N", bootstrap);
  in.token_reward = view<T>("token_reward_A", token_reward);
  in.mask = view<uint8_t>("mask_A", mask);
  in.cu_actions = view<int64_t>("cu_actions", cu_actions);
  in.kl_coef = static_cast<T>(kl_coef);
  in.gamma = static_cast<T>(gamma);
  in.decay = decay<T>("lam", gamma, lam);
  in.decoupled = lam_value.has_value();
  if (in.decoupled) in.value_decay = decay<T>("lam_value", gamma, *lam_value);
  in.estimator = kl_estimator(estimator);
  const int64_t actions = in.value.size;
  const GAEOutput<T> out{writable<T>("advantage_A", advantage, actions), writable<T>("return_A", returns, actions),
                         writable<T>("reward_A", reward, actions), writable<T>("kl_N", kl, in.score.size),
                         value_mask ? writable<uint8_t>("value_mask_A", *value_mask, actions) : nullptr};
  Moments moments;
  {
    py::gil_scoped_release release;
    moments = shaped_gae(in, out, threads);
  }
  return py::make_tuple(moments.count, moments.mean, moments.m2);
}

template <typename T>
void def_shaped_gae(py::module_& m, const char* name) {
  m.def(name, &py_shaped_gae<T>, py::arg("score_N"), py::arg("value_A"), py::arg("logprob_A"), py::arg("ref_logprob_A"),
        py::arg("cu_actions"), py::arg("bootstrap_N"), py::arg("mask_A"), py::arg("token_reward_A"),
        py::arg("advantage_A"), py::arg("return_A"), py::arg("reward_A"), py::arg("kl_N"),
        py::arg("value_mask_A"), py::arg("kl_estimator"), py::arg("kl_coef"), py::arg("gamma"), py::arg("lam"),
        py::arg("lam_value"), py::arg("threads"),
        "Write rewards, advantages, returns and KL to the output arrays; return (count, mean, m2) of the advantages.");
}

// The trunk's operations run thousands of times per iteration on little data, and numpy has no bf16: their wrappers in
// Python check tensors once, and pass addresses. An address of 0 is an absent tensor.
using Rows = std::array<int64_t, 5>;

RowLayout row_layout(const Rows& rows) { return {rows[0], rows[1], rows[2], rows[3], rows[4]}; }

// out_strides: how the rows of the result lie, as the last three of `rows`.
void py_rms_norm_forward(const std::string& dtype, const Rows& rows, const std::array<int64_t, 3>& out_strides, Address x,
                         Address residual, Address weight, Address out, Address sum, Address scale, double eps,
                         int64_t threads) {
  const RowLayout out_layout{rows[0], rows[1], out_strides[0], out_strides[1], out_strides[2]};
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    rms_norm_forward<T>({row_layout(rows), out_layout, at<T>(x), at<T>(residual), at<T>(weight), at<T>(out), at<T>(sum),
                         at<Wide<T>>(scale), eps},
                        threads);
  });
}

void py_rms_norm_backward(const std::string& dtype, const Rows& rows, Address grad, Address grad_sum, Address sum,
                          Address weight, Address scale, Address grad_x, Address grad_weight, int64_t threads) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    rms_norm_backward<T>({row_layout(rows), at<T>(grad), at<T>(grad_sum), at<T>(sum), at<T>(weight),
                          at<Wide<T>>(scale), at<T>(grad_x), nullptr},
                         at<Wide<T>>(grad_weight), threads);
  });
}

void py_swiglu_forward(const std::string& dtype, Address gate_up, Address out, int64_t rows, int64_t width,
                       int64_t threads) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    swiglu_forward<T>({at<T>(gate_up), nullptr, at<T>(out), rows, width}, threads);
  });
}

void py_swiglu_backward(const std::string& dtype, Address gate_up, Address grad, Address grad_gate_up, int64_t rows,
                        int64_t width, int64_t threads) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    swiglu_backward<T>({at<T>(gate_up), at<T>(grad), at<T>(grad_gate_up), rows, width}, threads);
  });
}

// Statistics [4, rows]: maximum, sum, label's logit, shifted sum.
void py_logit_statistics(const std::string& dtype, Address logits, Address labels, int64_t start, Address statistics,
                         int64_t rows, int64_t columns, double temperature, int64_t threads) {
  with_wide_dtype(dtype, [&](auto zero) {
    using W = decltype(zero);
    W* out = at<W>(statistics);
    logit_statistics<W>({at<W>(logits), out, out + rows, out + 2 * rows, out + 3 * rows},
                        {at<int64_t>(labels), start, columns, static_cast<W>(temperature)}, rows, threads);
  });
}

void py_logit_gradients(const std::string& dtype, Address logits, Address sources, Address labels, int64_t start,
                        const std::array<Address, 5>& of_rows, int64_t count, int64_t columns, double temperature,
                        int64_t threads) {
  with_wide_dtype(dtype, [&](auto zero) {
    using W = decltype(zero);
    logit_gradients<W>({at<W>(logits), at<int64_t>(sources), at<W>(of_rows[0]), at<W>(of_rows[1]), at<W>(of_rows[2]),
                        at<W>(of_rows[3]), at<W>(of_rows[4])},
                       {at<int64_t>(labels), start, columns, static_cast<W>(temperature)}, count, threads);
  });
}

// A view of an array of the scheduler, which stays alive with it; valid until the next plan.
template <typename T>
py::array_t<T> borrowed(const std::vector<T>& values, int64_t size, const py::object& owner) {
  return py::array_t<T>(static_cast<py::ssize_t>(size), values.data(), owner);
}

py::dict py_plan(const py::object& self) {
  auto& scheduler = self.cast<BlockScheduler&>();
  const StepPlan* plan;
  {
    py::gil_scoped_release release;
    plan = &scheduler.plan();
  }
  py::dict out;
  out["n_decodes"] = plan->n_decodes;
  out["tokens_T"] = borrowed(plan->tokens, plan->n_rows, self);
  out["positions_T"] = borrowed(plan->positions, plan->n_rows, self);
  out["cache_slots_T"] = borrowed(plan->cache_slots, plan->n_rows, self);
  out["row_starts"] = borrowed(plan->row_starts, plan->n_scheduled + 1, self);
  out["lengths_S"] = borrowed(plan->lengths, plan->n_scheduled, self);
  out["table_rows_S"] = borrowed(plan->table_rows, plan->n_scheduled, self);
  out["sample_rows_N"] = borrowed(plan->sample_rows, plan->n_samples, self);
  out["sample_slots_N"] = borrowed(plan->sample_slots, plan->n_samples, self);
  out["sample_positions_N"] = borrowed(plan->sample_positions, plan->n_samples, self);
  out["sample_ids_N"] = borrowed(plan->sample_ids, plan->n_samples, self);
  out["copy_from_C"] = borrowed(plan->copy_from, plan->n_copies, self);
  out["copy_to_C"] = borrowed(plan->copy_to, plan->n_copies, self);
  out["update_entries_U"] = borrowed(plan->update_entries, plan->n_updates, self);
  out["update_blocks_U"] = borrowed(plan->update_blocks, plan->n_updates, self);
  return out;
}

py::dict py_scheduler_stats(const BlockScheduler& scheduler) {
  const SchedulerStats& stats = scheduler.stats();
  py::dict out;
  out["prompt_tokens"] = stats.prompt_tokens;
  out["reused_tokens"] = stats.reused_tokens;
  out["shared_tokens"] = stats.shared_tokens;
  out["recomputed_tokens"] = stats.recomputed_tokens;
  out["preemptions"] = stats.preemptions;
  out["copies"] = stats.copies;
  return out;
}

void def_scheduler(py::module_& m) {
  py::class_<BlockScheduler>(m, "BlockScheduler")
      .def(py::init([](int32_t n_blocks, int32_t block_size, int32_t max_sequences, int32_t max_length,
                       int32_t token_budget, bool longest_first, bool reuse_prefixes) {
             const Order order = longest_first ? Order::kLongestRemaining : Order::kFirstCome;
             return std::make_unique<BlockScheduler>(SchedulerLimits{n_blocks, block_size, max_sequences, max_length,
                                                                     token_budget, order, reuse_prefixes});
           }),
           py::arg("n_blocks"), py::arg("block_size"), py::arg("max_sequences"), py::arg("max_length"),
           py::arg("token_budget"), py::arg("longest_first"), py::arg("reuse_prefixes"))
      .def("submit",
           [](BlockScheduler& self, const std::vector<int64_t>& ids, const py::array& prompt, int64_t max_new_tokens) {
             const Span<int32_t> tokens = view<int32_t>("prompt", prompt);
             self.submit(ids, tokens.data, tokens.size, max_new_tokens);
           })
      .def("plan", &py_plan)
      .def("complete",
           [](BlockScheduler& self, const py::array& tokens, const py::array& finished) {
             const Span<int32_t> token_view = view<int32_t>("token_N", tokens);
             const Span<uint8_t> finished_view = view<uint8_t>("finished_N", finished);
             require(finished_view.size == token_view.size, "finished_N: expected ", token_view.size, " entries, got ",
                     finished_view.size);
             py::gil_scoped_release release;
             return self.complete(token_view.data, finished_view.data, token_view.size);
           })
      .def("abort", &BlockScheduler::abort)
      .def("resume", &BlockScheduler::resume)
      .def("remove", &BlockScheduler::remove)
      .def("forget_cache", &BlockScheduler::forget_cache)
      .def("check_invariants", &BlockScheduler::check_invariants)
      .def("tokens",
           [](const BlockScheduler& self, int64_t id) {
             return to_numpy(std::vector<int32_t>(self.tokens(id)));
           })
      .def("is_finished", &BlockScheduler::is_finished)
      .def("stats", &py_scheduler_stats)
      .def_property_readonly("block_table",
                             [](const py::object& self) {
                               const auto& scheduler = self.cast<const BlockScheduler&>();
                               const auto& limits = scheduler.limits();
                               return py::array_t<int32_t>({limits.max_sequences, scheduler.max_blocks()},
                                                           scheduler.block_table().data(), self);
                             })
      .def_property_readonly("n_running", &BlockScheduler::n_running)
      .def_property_readonly("n_waiting", &BlockScheduler::n_waiting)
      .def_property_readonly("n_in_flight", &BlockScheduler::n_in_flight)
      .def_property_readonly("blocks_available", [](const BlockScheduler& self) { return self.pool().available(); })
      .def_property_readonly("blocks_reusable", [](const BlockScheduler& self) { return self.pool().reusable(); });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Packing, balancing and CPU kernels on raw arrays. The public functions: icegrt.packing, icegrt.kernels, icegrt.scheduling.";
  m.def("pack", &py_pack, py::arg("prompt_tokens"), py::arg("prompt_offsets"), py::arg("response_tokens"),
        py::arg("response_offsets"), py::arg("mask_offsets"), py::arg("tail_multiple"), py::arg("tail_token"),
        py::arg("share_prompts"),
        "Pack ragged prompts and responses into a token stream and an action stream.");
  m.def("balance", &py_balance, py::arg("lengths"), py::arg("costs"), py::arg("token_budget"), py::arg("ranks"),
        py::arg("round_to"),
        "Assign sequences; return (micro-batches per rank, order, offsets, tokens per micro-batch).");
  def_shaped_gae<float>(m, "shaped_gae_float32");
  def_shaped_gae<double>(m, "shaped_gae_float64");
  const auto without_gil = py::call_guard<py::gil_scoped_release>();
  m.def("rms_norm_forward", &py_rms_norm_forward, without_gil, "Write the norm of rows, and their sums with a residual.");
  m.def("rms_norm_backward", &py_rms_norm_backward, without_gil, "Write the gradients by rows and by the weight.");
  m.def("swiglu_forward", &py_swiglu_forward, without_gil, "Write silu(gate) * up of rows.");
  m.def("swiglu_backward", &py_swiglu_backward, without_gil, "Write the gradients by gate and up.");
  m.def("logit_statistics", &py_logit_statistics, without_gil, "Write maximum, sums and label's logit of rows of logits.");
  m.def("logit_gradients", &py_logit_gradients, without_gil, "Write the gradient by rows of logits over them.");
  def_heads_and_pages(m);
  def_scheduler(m);
}
