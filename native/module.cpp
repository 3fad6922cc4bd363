// The Python bindings of the native code. They check arguments, keep arrays alive and release the
// GIL.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <unistd.h>

#include <optional>
#include <stdexcept>

#include "bandwidth.h"
#include "dispatch.h"
#include "memory.h"
#include "ops.h"
#include "pack.h"

namespace nb = nanobind;
using namespace nb::literals;

// In Python a buffer is a tuple: offset into the arena, width, stride.
template <> struct nb::detail::type_caster<deskside::Buffer> {
  NB_TYPE_CASTER(deskside::Buffer, const_name("tuple[int, int, int]"))

  bool from_python(handle source, uint8_t flags, cleanup_list* cleanup) noexcept {
    using Fields = std::tuple<int64_t, int, int>;
    make_caster<Fields> fields;
    if (!fields.from_python(source, flags, cleanup)) return false;
    const auto [offset, width, stride] = static_cast<Fields>(fields);
    value = {offset, width, stride};
    return true;
  }
};

namespace deskside {
namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutBytes = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using FloatMatrix = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Activations = nb::ndarray<nb::numpy, float, nb::ndim<1>>;
using Ints = nb::ndarray<const int32_t, nb::c_contig, nb::device::cpu>;

void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

// Packed weights owned by Python. They keep their arena alive.
struct PyWeights {
  std::shared_ptr<Arena> arena;
  Weights w;
  int64_t groups;  // number of matrices of the same shape, one after another

  // Writes matrix `group`, as the file's bytes, to `to` (rows, row bytes).
  void unpack(int64_t group, OutBytes to) const {
    const int64_t rows = w.rows / groups;
    require(group >= 0 && group < groups, "unpack: no such matrix");
    require(int64_t(to.shape(0)) == rows && int64_t(to.shape(1)) == file_row_bytes(w.type, w.cols),
            "unpack: rows of a wrong number or length");
    const uint8_t* from = w.data + group * panels_of(rows) * w.stride;
    nb::gil_scoped_release release;
    deskside::unpack(from, w.type, w.cols, rows, w.stride, to.data());
  }
};

int64_t panel_bytes(int type, int64_t cols) {
  const int64_t row = file_row_bytes(Type(type), cols);
  require(row > 0, "type without a kernel, or rows that are no whole blocks");
  return row * kPanelRows;
}

// pages: "auto" (transparent huge pages), "off" (4 KiB pages), "2MiB" or "1GiB" (reserved pages).
MemoryKind memory_kind(const std::string& pages, const std::vector<int>& nodes, bool strict) {
  const char* const names[] = {"off", "auto", "2MiB", "1GiB"};
  for (int node : nodes) require(node >= 0 && node < 4096, "nodes: numbers from 0 to 4095");
  for (int i = 0; i < 4; i++)
    if (pages == names[i]) return {Pages(i), nodes, strict};
  throw std::invalid_argument("pages: off, auto, 2MiB or 1GiB");
}

// Memory for weights, filled tensor by tensor.
class PyArena {
 public:
  // MemoryError if there is no room, or too few pages are reserved.
  PyArena(int64_t bytes, const std::string& pages, const std::vector<int>& nodes, bool strict) {
    require(bytes >= 0, "arena: negative size");
    const MemoryKind kind = memory_kind(pages, nodes, strict);
    nb::gil_scoped_release release;
    arena_ = std::make_shared<Arena>(bytes, kind);
  }

  // group_bytes: from one matrix to the next in the file; -1 where nothing lies between them.
  PyWeights from_file(int fd, int64_t offset, int type, int64_t cols, int64_t rows, int64_t groups,
                      int64_t at, int64_t stride, int n_threads, int64_t group_bytes) {
    const int64_t own = rows * (panel_bytes(type, cols) / kPanelRows);
    if (group_bytes == -1) group_bytes = own;
    require(group_bytes >= own, "pack: the matrices overlap");
    return fill({nullptr, fd, offset, group_bytes}, type, cols, rows, groups, at, stride,
                n_threads);
  }

  PyWeights from_array(Bytes data, int type, int64_t cols, int64_t groups, int64_t at,
                       int64_t stride, int n_threads) {
    require(groups >= 1 && int64_t(data.shape(0)) % groups == 0,
            "pack: rows do not divide by groups");
    require(int64_t(data.shape(1)) * kPanelRows == panel_bytes(type, cols),
            "pack: rows of a wrong length");
    const int64_t rows = int64_t(data.shape(0)) / groups;
    return fill({data.data(), -1, 0, rows * int64_t(data.shape(1))}, type, cols, rows, groups, at,
                stride, n_threads);
  }

  int64_t nbytes() const { return arena_->bytes(); }
  int nodes_error() const { return arena_->nodes_error(); }

 private:
  PyWeights fill(const Source& from, int type, int64_t cols, int64_t rows, int64_t groups,
                 int64_t at, int64_t stride, int n_threads) {
    const int64_t panel = panel_bytes(type, cols), panels = panels_of(rows);
    require(rows >= 1 && groups >= 1 && n_threads >= 1, "pack: nothing to pack");
    require(at >= 0 && at % 4 == 0 && stride % 4 == 0 && stride >= panel &&
                at + (groups * panels - 1) * stride + panel <= arena_->bytes(),
            "pack: the weights lie outside the arena");
    uint8_t* to = arena_->data() + at;
    {
      nb::gil_scoped_release release;
      pack(from, Type(type), cols, rows, groups, to, stride, n_threads);
    }
    return {arena_, {to, Type(type), rows * groups, cols, stride}, groups};
  }

  std::shared_ptr<Arena> arena_;
};

class PyReader {
 public:
  PyReader(int64_t bytes, int n_threads, const std::string& pages, const std::vector<int>& nodes,
           const std::vector<int>& cpus) {
    const MemoryKind kind = memory_kind(pages, nodes, true);
    check(cpus);
    nb::gil_scoped_release release;
    reader_ = std::make_unique<Reader>(bytes, kind, n_threads, cpus);
  }

  double read(int n_threads, int repeats, const std::vector<int>& cpus) const {
    check(cpus);
    nb::gil_scoped_release release;
    return reader_->read(n_threads, repeats, cpus);
  }

  int nodes_error() const { return reader_->memory().nodes_error(); }

 private:
  static void check(const std::vector<int>& cpus) {
    for (int cpu : cpus) require(cpu >= 0 && cpu < 1024, "cpus: numbers from 0 to 1023");
  }

  std::unique_ptr<Reader> reader_;
};

// The work memory of a program that is not built, from the shapes of its ops. Each op computes its
// own need, so that the formula exists once.
class PyWorkMemory {
 public:
  explicit PyWorkMemory(int max_tokens) : max_tokens_(max_tokens) {}

  void linear(int cols) {
    Linear op{};
    op.in.f.width = cols;
    add(op);
  }

  void attention(int heads, int head_dim) {
    Attention op{};
    op.heads = heads;
    op.head_dim = head_dim;
    add(op);
  }

  void sort_experts(int n_expert, int top_k) {
    SortExperts op{};
    op.shape = {n_expert, top_k, 0};
    add(op);
  }

  void experts_up(int cols) {
    ExpertsUp op{};
    op.in.f.width = cols;
    add(op);
  }

  void experts_down(int cols) {
    ExpertsDown op{};
    op.shape.width = cols;
    add(op);
  }

  int64_t nbytes(int n_threads) const { return need_.bytes(n_threads); }

 private:
  template <class T> void add(T op) { need_.add(OpOf<T>(std::move(op)), max_tokens_); }

  const int max_tokens_;
  WorkMemory need_;
};

// Team::share takes rows as tasks, and counts them in 20 bits.
constexpr int kMaxTokens = 1 << 18;

class PyProgram {
 public:
  PyProgram(int n_threads, int max_tokens, int64_t arena_floats, const std::string& isa)
      : program_((require(n_threads >= 1 && max_tokens >= 1 && max_tokens <= kMaxTokens &&
                              arena_floats >= 0,
                          "n_threads and max_tokens must be at least 1, max_tokens at most 262144"),
                  n_threads),
                 max_tokens, arena_floats, isa),
        arena_floats_(arena_floats) {}

  void begin(const std::string& kind) {
    const char* const names[] = {"rows", "outputs", "once", "tasks"};
    for (int i = 0; i < 4; i++)
      if (kind == names[i]) {
        begun_ = true;
        return program_.begin(Step::Kind(i));
      }
    throw std::invalid_argument("begin: rows, outputs, once or tasks");
  }

  void embed(Bytes table, int type, int64_t cols, Buffer out) {
    const int64_t row_bytes = file_row_bytes(Type(type), cols);
    require(row_bytes >= 0, "embed: type without a kernel, or rows that are no whole blocks");
    require(int64_t(table.shape(1)) == row_bytes, "embed: rows of a wrong length");
    keep_.push_back(nb::cast(table));
    n_vocab_ = int(table.shape(0));
    add(Embed{.table = table.data(),
              .type = Type(type),
              .cols = cols,
              .row_bytes = row_bytes,
              .out = out});
  }

  void norm(Buffer in, Buffer out, Floats weight, float eps, std::optional<Buffer> gate) {
    const int group = int(weight.size());
    require(group > 0 && in.width % group == 0, "norm: width is no multiple of the group");
    add(Norm{.in = in,
             .gate = gate.value_or(Buffer{}),
             .out = out,
             .gated = gate.has_value(),
             .weight = floats(weight),
             .group = group,
             .eps = eps});
  }

  void quantize(Buffer in, Buffer out) {
    require(in.width % 32 == 0 && int64_t(out.width) * 4 == record_bytes(in.width),
            "quantize: bad widths");
    add(Quantize{.in = in, .out = out});
  }

  // parts: tuples of weights, out, to_logits, the weights of `up` or None, and a convolution's
  // (taps, state) or None.
  void linear(Buffer in, Buffer record, bool per_output, nb::list parts) {
    Linear op{.in = {in, record}, .per_output = per_output, .parts = {}};
    for (nb::handle entry : parts) {
      auto t = nb::cast<nb::tuple>(entry);
      Linear::Part p{.w = matrix(nb::cast<const PyWeights&>(t[0]), op.in),
                     .out = nb::cast<Buffer>(t[1]),
                     .to_logits = nb::cast<bool>(t[2])};
      if (p.to_logits) n_logits_ = int(p.w.rows);
      require(p.to_logits || p.out.width == p.w.rows, "linear: bad output width");
      if (!t[3].is_none()) {
        p.has_up = true;
        p.up = matrix(nb::cast<const PyWeights&>(t[3]), op.in);
        require(p.up.rows == p.w.rows, "linear: gate and up differ");
      }
      if (!t[4].is_none()) {
        auto conv = nb::cast<nb::tuple>(t[4]);
        const auto taps = nb::cast<Floats>(conv[0]);
        require(taps.ndim() == 2 && int64_t(taps.shape(1)) == p.w.rows, "conv: bad weight shape");
        p.kernel = int(taps.shape(0));
        p.taps.assign(taps.data(), taps.data() + taps.size());
        p.state = used_state(nb::cast<int>(conv[1]));
      }
      op.parts.push_back(std::move(p));
    }
    add(std::move(op));
  }

  void split_gate(Buffer in, Buffer out, Buffer gate, int heads, int head_dim) {
    add(SplitGate{.in = in, .out = out, .gate = gate, .heads = heads, .head_dim = head_dim});
  }

  void rope(Buffer in, Buffer out, int heads, int head_dim, int n_rot, bool neox,
            std::vector<double> inv_freq) {
    require(int(inv_freq.size()) == n_rot / 2 && n_rot <= head_dim, "rope: bad n_rot");
    add(Rope{.in = in,
             .out = out,
             .heads = heads,
             .head_dim = head_dim,
             .n_rot = n_rot,
             .neox = neox,
             .inv_freq = std::move(inv_freq)});
  }

  void store_kv(Buffer k, Buffer v, int kv_heads, int head_dim, int state) {
    add(StoreKV{
        .k = k, .v = v, .kv_heads = kv_heads, .head_dim = head_dim, .state = used_state(state)});
  }

  void attention(Buffer q, Buffer out, int heads, int kv_heads, int head_dim, float scale,
                 int state) {
    require(kv_heads > 0 && heads % kv_heads == 0, "attention: heads is no multiple of kv_heads");
    add(Attention{.q = q,
                  .out = out,
                  .heads = heads,
                  .kv_heads = kv_heads,
                  .head_dim = head_dim,
                  .scale = scale,
                  .state = used_state(state)});
  }

  void merge_attention(Buffer out, int heads, int head_dim) {
    add(MergeAttention{.out = out, .heads = heads, .head_dim = head_dim});
  }

  void delta_gates(Buffer qkv, Buffer a, Buffer b, Floats ssm_a, Floats dt_bias, int k_heads,
                   int v_heads, int head_dim, float eps) {
    require(
        int(ssm_a.size()) == v_heads && int(dt_bias.size()) == v_heads && v_heads % k_heads == 0,
        "gated_delta: bad head counts");
    add(DeltaGates{.qkv = qkv,
                   .a = a,
                   .b = b,
                   .ssm_a = floats(ssm_a),
                   .dt_bias = floats(dt_bias),
                   .k_heads = k_heads,
                   .v_heads = v_heads,
                   .head_dim = head_dim,
                   .eps = eps});
  }

  void gated_delta(Buffer qkv, Buffer decay, Buffer beta, Buffer out, int k_heads, int v_heads,
                   int head_dim, int state) {
    add(GatedDelta{.qkv = qkv,
                   .decay = decay,
                   .beta = beta,
                   .out = out,
                   .k_heads = k_heads,
                   .v_heads = v_heads,
                   .head_dim = head_dim,
                   .state = used_state(state)});
  }

  void swiglu(Buffer x, Buffer y, Buffer out) { add(Binary{Binary::kSwiglu, x, y, out}); }
  void sigmoid_gate(Buffer x, Buffer y, Buffer out) {
    add(Binary{Binary::kSigmoidGate, x, y, out});
  }
  void residual(Buffer x, Buffer y, Buffer out) { add(Binary{Binary::kAdd, x, y, out}); }

  void route(Buffer logits, Buffer ids, Buffer weights, int top_k) {
    require(top_k >= 1 && top_k <= logits.width, "route: bad top_k");
    add(Route{.logits = logits, .ids = ids, .weights = weights, .top_k = top_k});
  }

  void sort_experts(Buffer ids, int n_expert, int width) {
    add(SortExperts{.shape = {n_expert, ids.width, width}, .ids = ids});
  }

  void experts_up(Buffer in, Buffer record, Buffer out, Buffer out_record, int top_k,
                  const PyWeights& gate, const PyWeights& up) {
    require(up.w.rows == gate.w.rows, "experts: gate and up differ");
    const Input x{in, record};
    add(ExpertsUp{.shape = {int(gate.groups), top_k, int(gate.w.rows / gate.groups)},
                  .in = x,
                  .out = {out, out_record},
                  .weights = {matrix(gate, x), matrix(up, x)}});
  }

  void experts_down(Buffer in, Buffer record, Buffer weights, Buffer out, int top_k,
                    const PyWeights& down) {
    const int width = int(down.w.cols);
    require(down.w.rows == down.groups * out.width && in.width == top_k * width,
            "experts: bad shapes");
    Input one_pair{in, record};
    one_pair.f.width = width;
    add(ExpertsDown{.shape = {int(down.groups), top_k, width},
                    .in = {in, record},
                    .weights = weights,
                    .out = out,
                    .down = matrix(down, one_pair)});
  }

  void take_rows(Buffer in, Buffer out) { add(TakeRows{.in = in, .out = out}); }

  void finish() { program_.finish(); }

  // One entry per state: its arrays (slots, ...), and for keys and values their types.
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

  // The arena of activations: callers of a part of the steps write its inputs and read its outputs.
  Activations activations() {
    return Activations(program_.activations(), {size_t(arena_floats_)}, nb::find(this));
  }

  // Runs the steps [begin, end); end = -1 stands for all. segments: (n, 3) of slot, position, token
  // count. Returns the microseconds of each step if `profile`.
  std::vector<double> run(Ints tokens, Ints segments, Ints outputs, FloatMatrix logits,
                          bool profile, int begin, int end, int threads) {
    if (threads == 0) threads = program_.n_threads();
    require(threads >= 1 && threads <= program_.n_threads(), "run: bad number of threads");
    const int n_steps = int(program_.n_steps());
    if (end < 0) end = n_steps;
    require(begin >= 0 && begin <= end && end <= n_steps, "run: bad range of steps");
    Batch batch;
    batch.tokens.assign(tokens.data(), tokens.data() + tokens.size());
    batch.outputs.assign(outputs.data(), outputs.data() + outputs.size());
    const int n = int(batch.tokens.size());
    require(n >= 1 && n <= program_.max_tokens(), "run: bad number of tokens");
    require(int(batch.outputs.size()) <= program_.max_tokens(), "run: too many outputs");
    // A program without embedding reads no tokens, and one without head writes no logits.
    for (int32_t t : batch.tokens)
      require(t >= 0 && (n_vocab_ == 0 || t < n_vocab_), "run: token id out of range");
    for (int32_t i : batch.outputs) require(i >= 0 && i < n, "run: output row out of range");
    require(segments.ndim() == 2 && segments.shape(1) == 3, "run: bad segments");
    int row = 0;
    for (size_t i = 0; i < segments.shape(0); i++) {
      const int32_t* s = segments.data() + 3 * i;
      require(s[0] >= 0 && s[1] >= 0 && s[2] >= 1, "run: bad segment");
      batch.segments.push_back({s[0], s[1], s[2], row});
      batch.segment_of.insert(batch.segment_of.end(), size_t(s[2]), int32_t(i));
      row += s[2];
    }
    require(row == n, "run: segments do not add up to the tokens");
    require(n_logits_ == 0 ||
                (logits.shape(0) == batch.outputs.size() && int(logits.shape(1)) == n_logits_),
            "run: bad logits shape");
    require(int(program_.n_states()) >= n_states_, "run: set_states was not called");
    batch.logits = logits.data();
    if (getpid() != pid_)
      throw std::runtime_error("run: the threads did not survive a fork; make a program here");
    std::vector<double> micros;
    bool done;
    {
      nb::gil_scoped_release release;
      done =
          program_.run(batch, threads, size_t(begin), size_t(end), profile ? &micros : nullptr, [] {
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
  template <class T> void add(T op) {
    require(begun_, "begin() comes first");
    program_.add(std::make_unique<OpOf<T>>(std::move(op)));
  }

  // Checks weights against the rows of `x`: equal columns, and records if they are quantised.
  Weights matrix(const PyWeights& w, const Input& x) {
    require(w.w.cols == x.f.width, "matrix: rows of a wrong length");
    require(is_float(w.w.type) || int64_t(x.q.width) * 4 >= record_bytes(x.f.width),
            "matrix: its input was not quantised");
    arenas_.push_back(w.arena);
    return w.w;
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
  const int64_t arena_floats_;
  const pid_t pid_ = getpid();
  std::vector<nb::object> keep_, keep_states_;
  std::vector<std::shared_ptr<Arena>> arenas_;  // of the weights
  bool begun_ = false;
  int n_vocab_ = 0, n_logits_ = 0, n_states_ = 0;
};

}  // namespace
}  // namespace deskside

NB_MODULE(_native, m) {
  using deskside::PyProgram;
  m.doc() = "deskside's native kernels";
  m.def(
      "instruction_sets",
      [] {
        std::vector<std::tuple<std::string, bool>> sets;
        for (const auto& isa : deskside::instruction_sets())
          sets.emplace_back(isa.kernels->name, isa.supported);
        return sets;
      },
      "(name, supported) of every compiled instruction set, slowest first.");
  m.def(
      "choose",
      [](const std::string& isa) { return std::string(deskside::choose_kernels(isa).name); },
      "isa"_a = "", "The instruction set that would run.");
  m.def(
      "read_bandwidth",
      [](int n_threads, int64_t bytes, int repeats) {
        return deskside::Reader(bytes, {}, n_threads, {}).read(n_threads, repeats, {});
      },
      "n_threads"_a, "bytes"_a, "repeats"_a, nb::call_guard<nb::gil_scoped_release>(),
      "Best bytes per second of `repeats` passes of n_threads over `bytes` of memory.");
  m.def("compute_limit", &deskside::compute_limit, "n_threads"_a, "isa"_a = "", "repeats"_a = 5,
        "floats"_a = false, nb::call_guard<nb::gil_scoped_release>(),
        "Best 8-bit or float32 products per second of n_threads on registers: the limit of any "
        "matrix kernel.");
  m.def("barrier_seconds", &deskside::barrier_seconds, "n_threads"_a, "seconds"_a = 0.1,
        nb::call_guard<nb::gil_scoped_release>(),
        "Seconds of an undisturbed barrier of n_threads.");
  nb::class_<deskside::PyReader>(m, "Reader")
      .def(nb::init<int64_t, int, const std::string&, const std::vector<int>&,
                    const std::vector<int>&>(),
           "bytes"_a, "n_threads"_a, "pages"_a = "auto", "nodes"_a = std::vector<int>(),
           "cpus"_a = std::vector<int>())
      .def("read", &deskside::PyReader::read, "n_threads"_a, "repeats"_a,
           "cpus"_a = std::vector<int>())
      .def_prop_ro("nodes_error", &deskside::PyReader::nodes_error);
  m.attr("PANEL_ROWS") = deskside::kPanelRows;
#if defined(__clang__)
  m.attr("compiler") = __VERSION__;
#else
  m.attr("compiler") = "GCC " __VERSION__;
#endif
  m.def("panel_bytes", &deskside::panel_bytes, "type"_a, "cols"_a, "Bytes of 16 packed rows.");
  m.def("record_bytes", &deskside::record_bytes, "cols"_a, "Bytes of a row of 8-bit activations.");
  nb::class_<deskside::PyWeights>(m, "Weights")
      .def("unpack", &deskside::PyWeights::unpack, "group"_a, "to"_a,
           "One matrix as the file has it, into uint8 (rows, row bytes).");
  nb::class_<deskside::PyArena>(m, "Arena")
      .def(nb::init<int64_t, const std::string&, const std::vector<int>&, bool>(), "bytes"_a,
           "pages"_a = "auto", "nodes"_a = std::vector<int>(), "strict"_a = false)
      .def("from_file", &deskside::PyArena::from_file, "fd"_a, "offset"_a, "type"_a, "cols"_a,
           "rows"_a, "groups"_a, "at"_a, "stride"_a, "n_threads"_a, "group_bytes"_a = -1)
      .def("from_array", &deskside::PyArena::from_array, "data"_a, "type"_a, "cols"_a, "groups"_a,
           "at"_a, "stride"_a, "n_threads"_a)
      .def_prop_ro("nbytes", &deskside::PyArena::nbytes)
      .def_prop_ro("nodes_error", &deskside::PyArena::nodes_error);
  m.attr("MAX_TASKS_OPS") = deskside::kMaxTasksOps;
  using deskside::PyWorkMemory;
  nb::class_<PyWorkMemory>(m, "WorkMemory", "Work memory of a program, from the shapes of its ops.")
      .def(nb::init<int>(), "max_tokens"_a)
      .def("linear", &PyWorkMemory::linear, "cols"_a)
      .def("attention", &PyWorkMemory::attention, "heads"_a, "head_dim"_a)
      .def("sort_experts", &PyWorkMemory::sort_experts, "n_expert"_a, "top_k"_a)
      .def("experts_up", &PyWorkMemory::experts_up, "cols"_a)
      .def("experts_down", &PyWorkMemory::experts_down, "cols"_a)
      .def("nbytes", &PyWorkMemory::nbytes, "n_threads"_a);
  nb::class_<PyProgram>(m, "Program")
      .def(nb::init<int, int, int64_t, const std::string&>(), "n_threads"_a, "max_tokens"_a,
           "arena_floats"_a, "isa"_a = "")
      .def("begin", &PyProgram::begin)
      .def("embed", &PyProgram::embed)
      .def("norm", &PyProgram::norm, "input"_a, "out"_a, "weight"_a, "eps"_a, "gate"_a = nb::none())
      .def("quantize", &PyProgram::quantize)
      .def("linear", &PyProgram::linear)
      .def("split_gate", &PyProgram::split_gate)
      .def("rope", &PyProgram::rope)
      .def("store_kv", &PyProgram::store_kv)
      .def("attention", &PyProgram::attention)
      .def("merge_attention", &PyProgram::merge_attention)
      .def("delta_gates", &PyProgram::delta_gates)
      .def("gated_delta", &PyProgram::gated_delta)
      .def("swiglu", &PyProgram::swiglu)
      .def("sigmoid_gate", &PyProgram::sigmoid_gate)
      .def("add", &PyProgram::residual)
      .def("route", &PyProgram::route)
      .def("sort_experts", &PyProgram::sort_experts)
      .def("experts_up", &PyProgram::experts_up)
      .def("experts_down", &PyProgram::experts_down)
      .def("take_rows", &PyProgram::take_rows)
      .def("finish", &PyProgram::finish)
      .def("set_states", &PyProgram::set_states)
      .def("run", &PyProgram::run, "tokens"_a, "segments"_a, "outputs"_a, "logits"_a,
           "profile"_a = false, "begin"_a = 0, "end"_a = -1, "threads"_a = 0,
           "threads: how many of the program's run it; 0 for all of them.")
      .def_prop_ro("activations", &PyProgram::activations)
      .def_prop_ro("isa", &PyProgram::isa)
      .def_prop_ro("n_threads", &PyProgram::n_threads)
      .def_prop_ro("nbytes", &PyProgram::nbytes);
}
