// Python's view of the native code. Checks arguments, keeps arrays alive, releases the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <unistd.h>

#include <stdexcept>

#include "bandwidth.h"
#include "dispatch.h"
#include "ops.h"
#include "quants.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace deskside {
namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using FloatMatrix = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::c_contig, nb::device::cpu>;
using Place = std::tuple<int64_t, int>;  // offset into the arena, width

void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

Buffer buffer(Place p) { return {std::get<0>(p), std::get<1>(p)}; }

// Bytes of a row of n weights; -1 for a type without a kernel or rows that are no whole blocks.
int64_t row_bytes(int type, int64_t n) {
  struct {
    Type type;
    int block, bytes, header;
  } const table[] = {
      {Type::F32, 1, 4, 0},
      {Type::F16, 1, 2, 0},
      {Type::BF16, 1, 2, 0},
      {Type::Q4_0, 32, sizeof(BlockQ4_0), 0},
      {Type::Q4_1, 32, sizeof(BlockQ4_1), 0},
      {Type::Q5_0, 32, sizeof(BlockQ5_0), 0},
      {Type::Q5_1, 32, sizeof(BlockQ5_1), 0},
      {Type::Q8_0, 32, sizeof(BlockQ8_0), 0},
      {Type::Q4_K, 256, sizeof(BlockQ4_K), 0},
      {Type::Q5_K, 256, sizeof(BlockQ5_K), 0},
      {Type::Q6_K, 256, sizeof(BlockQ6_K), 0},
      {Type::IQ4_NL, 32, sizeof(BlockIQ4_NL), 0},
      {Type::IQ4_XS, 256, sizeof(BlockIQ4_XS), 0},
      {Type::IQ4_KS, 256, sizeof(BlockIQ4_KS), 4},
      {Type::IQ4_KSS, 256, sizeof(BlockIQ4_KSS), 4},
  };
  for (const auto& t : table)
    if (int(t.type) == type) return n % t.block ? -1 : n / t.block * t.bytes + t.header;
  return -1;
}

class PyProgram {
 public:
  PyProgram(int n_threads, int max_tokens, int64_t arena_floats, const std::string& isa)
      : program_((require(n_threads >= 1 && max_tokens >= 1 && arena_floats >= 0,
                          "n_threads and max_tokens must be at least 1"),
                  n_threads),
                 max_tokens, arena_floats, isa) {}

  void embed(Bytes table, int type, int cols, Place out) {
    auto op = std::make_unique<Embed>();
    op->table = matrix(table, type, cols);
    op->out = buffer(out);
    n_vocab_ = int(table.shape(0));
    program_.add(std::move(op));
  }

  void norm(Place in, Place out, Floats weight, float eps, bool per_output, nb::object gate) {
    auto op = std::make_unique<Norm>();
    op->in = buffer(in);
    op->out = buffer(out);
    op->gated = !gate.is_none();
    op->gate = op->gated ? buffer(nb::cast<Place>(gate)) : Buffer{0, 0};
    op->weight = floats(weight);
    op->group = int(weight.size());
    op->eps = eps;
    op->per_output = per_output;
    require(op->group > 0 && op->in.width % op->group == 0, "norm: width is no multiple of the group");
    program_.add(std::move(op));
  }

  void linear(Place in, bool per_output, std::vector<std::tuple<Bytes, int, Place, bool>> parts) {
    auto op = std::make_unique<Linear>();
    op->in = buffer(in);
    op->per_output = per_output;
    for (auto& [w, type, out, to_logits] : parts) {
      op->parts.push_back({matrix(w, type, op->in.width), buffer(out), to_logits});
      if (to_logits) n_logits_ = int(w.shape(0));
    }
    program_.add(std::move(op));
  }

  void split_gate(Place in, Place out, Place gate, int heads, int head_dim) {
    auto op = std::make_unique<SplitGate>();
    op->in = buffer(in);
    op->out = buffer(out);
    op->gate = buffer(gate);
    op->heads = heads;
    op->head_dim = head_dim;
    program_.add(std::move(op));
  }

  void rope(Place in, Place out, int heads, int head_dim, int n_rot, bool neox,
            std::vector<double> inv_freq) {
    require(int(inv_freq.size()) == n_rot / 2 && n_rot <= head_dim, "rope: bad n_rot");
    auto op = std::make_unique<Rope>();
    op->in = buffer(in);
    op->out = buffer(out);
    op->heads = heads;
    op->head_dim = head_dim;
    op->n_rot = n_rot;
    op->neox = neox;
    op->inv_freq = std::move(inv_freq);
    program_.add(std::move(op));
  }

  void attention(Place q, Place k, Place v, Place out, int heads, int kv_heads, int head_dim,
                 float scale, int state) {
    require(kv_heads > 0 && heads % kv_heads == 0, "attention: heads is no multiple of kv_heads");
    auto op = std::make_unique<Attention>();
    op->q = buffer(q);
    op->k = buffer(k);
    op->v = buffer(v);
    op->out = buffer(out);
    op->heads = heads;
    op->kv_heads = kv_heads;
    op->head_dim = head_dim;
    op->scale = scale;
    op->state = used_state(state);
    program_.add(std::move(op));
  }

  void conv_silu(Place in, Place out, Floats weight, int state) {
    require(weight.ndim() == 2 && int(weight.shape(1)) == std::get<1>(in), "conv: bad weight shape");
    auto op = std::make_unique<ConvSilu>();
    op->in = buffer(in);
    op->out = buffer(out);
    op->kernel = int(weight.shape(0));
    op->weight.assign(weight.data(), weight.data() + weight.size());
    op->state = used_state(state);
    program_.add(std::move(op));
  }

  void gated_delta(Place qkv, Place a, Place b, Place out, Floats ssm_a, Floats dt_bias,
                   int k_heads, int v_heads, int head_dim, float eps, int state) {
    require(int(ssm_a.size()) == v_heads && int(dt_bias.size()) == v_heads && v_heads % k_heads == 0,
            "gated_delta: bad head counts");
    auto op = std::make_unique<GatedDelta>();
    op->qkv = buffer(qkv);
    op->a = buffer(a);
    op->b = buffer(b);
    op->out = buffer(out);
    op->ssm_a = floats(ssm_a);
    op->dt_bias = floats(dt_bias);
    op->k_heads = k_heads;
    op->v_heads = v_heads;
    op->head_dim = head_dim;
    op->eps = eps;
    op->state = used_state(state);
    program_.add(std::move(op));
  }

  void swiglu(Place x, Place y, Place out) { binary(Binary::kSwiglu, x, y, out); }
  void sigmoid_gate(Place x, Place y, Place out) { binary(Binary::kSigmoidGate, x, y, out); }
  void residual(Place x, Place y, Place out) { binary(Binary::kAdd, x, y, out); }

  void route(Place logits, Place ids, Place weights, int top_k) {
    require(top_k >= 1 && top_k <= std::get<1>(logits), "route: bad top_k");
    auto op = std::make_unique<Route>();
    op->logits = buffer(logits);
    op->ids = buffer(ids);
    op->weights = buffer(weights);
    op->top_k = top_k;
    program_.add(std::move(op));
  }

  void experts(Place in, Place ids, Place weights, Place out, int n_expert, int width,
               std::tuple<Bytes, int> gate, std::tuple<Bytes, int> up, std::tuple<Bytes, int> down) {
    auto op = std::make_unique<Experts>();
    op->in = buffer(in);
    op->ids = buffer(ids);
    op->weights = buffer(weights);
    op->out = buffer(out);
    op->n_expert = n_expert;
    op->top_k = op->ids.width;
    op->width = width;
    op->gate = matrix(std::get<0>(gate), std::get<1>(gate), op->in.width);
    op->up = matrix(std::get<0>(up), std::get<1>(up), op->in.width);
    op->down = matrix(std::get<0>(down), std::get<1>(down), width);
    require(op->gate.rows == int64_t(n_expert) * width && op->up.rows == op->gate.rows &&
                op->down.rows == int64_t(n_expert) * op->out.width &&
                op->in.width == op->out.width,
            "experts: bad shapes");
    program_.add(std::move(op));
  }

  void take_rows(Place in, Place out) {
    auto op = std::make_unique<TakeRows>();
    op->in = buffer(in);
    op->out = buffer(out);
    program_.add(std::move(op));
  }

  void finish() { program_.finish(); }

  // One entry a state: arrays (slots, ...) and for keys and values their types.
  void set_states(nb::list entries) {
    std::vector<State> states;
    keep_states_.clear();
    for (nb::handle entry : entries) {
      auto t = nb::cast<nb::tuple>(entry);
      State s{};
      auto fill = [&](int i, uint8_t*& data, int64_t& slot, int64_t& head, int64_t& row) {
        auto a = nb::cast<nb::ndarray<nb::c_contig, nb::device::cpu>>(t[i]);
        const int64_t item = int64_t(a.itemsize());
        data = static_cast<uint8_t*>(a.data());
        slot = a.stride(0) * item;
        if (a.ndim() == 4) head = a.stride(1) * item, row = a.stride(2) * item;
        keep_states_.push_back(nb::cast<nb::object>(t[i]));
      };
      fill(0, s.k, s.k_slot, s.k_head, s.k_row);
      if (nb::len(t) == 4) {
        fill(1, s.v, s.v_slot, s.v_head, s.v_row);
        s.k_type = Type(nb::cast<int>(t[2]));
        s.v_type = Type(nb::cast<int>(t[3]));
      }
      states.push_back(s);
    }
    require(int(states.size()) >= n_states_, "set_states: too few states");
    program_.set_states(std::move(states));
  }

  // segments: (n, 3) of slot, position, token count. Returns each op's microseconds if `profile`.
  std::vector<double> run(Ints tokens, Ints segments, Ints outputs, FloatMatrix logits,
                          bool profile) {
    Batch batch;
    batch.tokens.assign(tokens.data(), tokens.data() + tokens.size());
    batch.outputs.assign(outputs.data(), outputs.data() + outputs.size());
    const int n = int(batch.tokens.size());
    require(n >= 1 && n <= program_.max_tokens(), "run: bad number of tokens");
    for (int32_t t : batch.tokens) require(t >= 0 && t < n_vocab_, "run: token id out of range");
    for (int32_t i : batch.outputs) require(i >= 0 && i < n, "run: output row out of range");
    require(segments.ndim() == 2 && segments.shape(1) == 3, "run: bad segments");
    int row = 0;
    for (size_t i = 0; i < segments.shape(0); i++) {
      const int32_t* s = segments.data() + 3 * i;
      require(s[0] >= 0 && s[1] >= 0 && s[2] >= 1, "run: bad segment");
      batch.segments.push_back({s[0], s[1], s[2], row});
      row += s[2];
    }
    require(row == n, "run: segments do not add up to the tokens");
    require(logits.shape(0) == batch.outputs.size() && int(logits.shape(1)) == n_logits_,
            "run: bad logits shape");
    require(int(program_.n_states()) >= n_states_, "run: set_states was not called");
    batch.logits = logits.data();
    if (getpid() != pid_)
      throw std::runtime_error("run: the threads did not survive a fork; make a program here");
    std::vector<double> micros;
    bool done;
    {
      nb::gil_scoped_release release;
      done = program_.run(batch, profile ? &micros : nullptr, [] {
        nb::gil_scoped_acquire acquire;
        return PyErr_CheckSignals() != 0;  // Ctrl-C: the exception is set
      });
    }
    if (!done) throw nb::python_error();
    return micros;
  }

  const char* isa() const { return program_.isa(); }
  int n_threads() const { return program_.n_threads(); }
  int64_t nbytes() const { return program_.nbytes(); }

 private:
  void binary(Binary::Kind kind, Place x, Place y, Place out) {
    auto op = std::make_unique<Binary>();
    op->kind = kind;
    op->x = buffer(x);
    op->y = buffer(y);
    op->out = buffer(out);
    program_.add(std::move(op));
  }

  Matrix matrix(const Bytes& w, int type, int cols) {
    const int64_t bytes = row_bytes(type, cols);
    require(bytes >= 0, "matrix: type without a kernel, or rows that are no whole blocks");
    require(int64_t(w.shape(1)) == bytes, "matrix: rows of a wrong length");
    keep_.push_back(nb::cast(w));
    return {w.data(), Type(type), int64_t(w.shape(0)), cols, int64_t(w.shape(1))};
  }

  const float* floats(const Floats& w) {
    keep_.push_back(nb::cast(w));
    return w.data();
  }

  int used_state(int state) {
    n_states_ = std::max(n_states_, state + 1);
    return state;
  }

  Program program_;
  const pid_t pid_ = getpid();
  std::vector<nb::object> keep_, keep_states_;
  int n_vocab_ = 0, n_logits_ = 0, n_states_ = 0;
};

}  // namespace
}  // namespace deskside

NB_MODULE(_native, m) {
  using deskside::PyProgram;
  m.doc() = "deskside's native kernels";
  m.def("instruction_sets", [] {
    std::vector<std::tuple<std::string, bool>> sets;
    for (const auto& isa : deskside::instruction_sets())
      sets.emplace_back(isa.kernels->name, isa.supported);
    return sets;
  }, "(name, supported) of every compiled instruction set, slowest first.");
  m.def("choose", [](const std::string& isa) { return std::string(deskside::choose_kernels(isa).name); },
        "isa"_a = "", "The instruction set that would run.");
  m.def("read_bandwidth", &deskside::read_bandwidth, "n_threads"_a, "bytes"_a, "repeats"_a,
        nb::call_guard<nb::gil_scoped_release>(),
        "Best bytes per second of `repeats` passes of n_threads over `bytes` of memory.");
  nb::class_<PyProgram>(m, "Program")
      .def(nb::init<int, int, int64_t, const std::string&>(), "n_threads"_a, "max_tokens"_a,
           "arena_floats"_a, "isa"_a = "")
      .def("embed", &PyProgram::embed)
      .def("norm", &PyProgram::norm, "input"_a, "out"_a, "weight"_a, "eps"_a, "per_output"_a,
           "gate"_a = nb::none())
      .def("linear", &PyProgram::linear)
      .def("split_gate", &PyProgram::split_gate)
      .def("rope", &PyProgram::rope)
      .def("attention", &PyProgram::attention)
      .def("conv_silu", &PyProgram::conv_silu)
      .def("gated_delta", &PyProgram::gated_delta)
      .def("swiglu", &PyProgram::swiglu)
      .def("sigmoid_gate", &PyProgram::sigmoid_gate)
      .def("add", &PyProgram::residual)
      .def("route", &PyProgram::route)
      .def("experts", &PyProgram::experts)
      .def("take_rows", &PyProgram::take_rows)
      .def("finish", &PyProgram::finish)
      .def("set_states", &PyProgram::set_states)
      .def("run", &PyProgram::run, "tokens"_a, "segments"_a, "outputs"_a, "logits"_a,
           "profile"_a = false)
      .def_prop_ro("isa", &PyProgram::isa)
      .def_prop_ro("n_threads", &PyProgram::n_threads)
      .def_prop_ro("nbytes", &PyProgram::nbytes);
}
