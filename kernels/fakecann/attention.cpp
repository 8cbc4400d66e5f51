// Fused attention: softmax(scale * q k^T, masked) v, and its backward pass, which computes the softmax again in fp32. A
// sink, one number a head, takes part in the softmax and has no value.
//
// B batch, S queries, T keys, N heads, D channels, H = N * D. Layouts: BSND, BNSD, BSH, SBH, and TND, in which
// sequences of different length lie one after the other and actual_seq_* hold their running ends.
#include "tensors.h"

using namespace fakecann;

static constexpr int64_t LARGEST_HEAD = 768, MOST_HEADS = 256, MOST_SEQUENCES = 2048,
                         COMPRESSED_MASK = 2048;
static const std::vector<std::string> LAYOUTS = {"BSND", "BNSD", "BSH", "SBH", "TND"};

namespace {

struct Arguments {
  Tensor query, key, value, mask, sink;
  const Integers *query_ends, *key_ends;
  double scale;
  int64_t heads, sparse_mode;
  std::string layout;

  bool flat() const { return layout == "BSH" || layout == "SBH"; }
  bool varied() const { return layout == "TND"; }
  bool compressed() const { return sparse_mode == 2 || sparse_mode == 3; }
  int64_t width() const { return flat() ? query->size(2) / heads : query->size(-1); }

  at::Tensor to_bnsd(const at::Tensor& given, int64_t channels) const {
    if (layout == "BNSD") return given;
    auto x = flat() ? given.unflatten(2, {-1, channels}) : varied() ? given.unsqueeze(0) : given;
    return layout == "SBH" ? x.permute({1, 2, 0, 3}) : x.transpose(1, 2);
  }
  at::Tensor from_bnsd(const at::Tensor& given) const {
    if (layout == "BNSD") return given;
    auto x = layout == "SBH" ? given.permute({2, 0, 1, 3}) : given.transpose(1, 2);
    return flat() ? x.flatten(2) : varied() ? x.squeeze(0) : x;
  }
};

void check_ends(const char* what, const Integers* ends, int64_t length) {
  TORCH_CHECK(ends && !ends->empty(), "layout TND needs ", what);
  require_range("the number of sequences", static_cast<int64_t>(ends->size()), 1, MOST_SEQUENCES);
  TORCH_CHECK(std::is_sorted(ends->begin(), ends->end()) && ends->back() == length, what,
              " must be running ends that reach ", length, "; given ", at::IntArrayRef(*ends));
}

void check_mask(const Arguments& given) {
  require_type("atten_mask", given.mask, {at::kBool, at::kByte});
  require_range("sparse_mode, as far as it is emulated,", given.sparse_mode, 0, 3);
  TORCH_CHECK(!given.compressed() || (given.mask && given.mask->size(-1) == COMPRESSED_MASK &&
                                      given.mask->size(-2) == COMPRESSED_MASK),
              "sparse_mode ", given.sparse_mode, " needs an atten_mask of 2048 by 2048");
}

void check(const Arguments& given) {
  for (auto [what, tensor] : {std::pair{"query", given.query}, {"key", given.key}, {"value", given.value}}) {
    require_type(what, tensor, FLOATING);
    TORCH_CHECK(tensor->scalar_type() == given.query->scalar_type(), what, " is ", tensor->scalar_type(),
                ", query is ", given.query->scalar_type());
  }
  TORCH_CHECK(std::find(LAYOUTS.begin(), LAYOUTS.end(), given.layout) != LAYOUTS.end(), "layout ", given.layout,
              " is not one of ", LAYOUTS);
  require_range("head_num", given.heads, 1, MOST_HEADS);
  require_range("the number of channels of a head", given.width(), 1, LARGEST_HEAD);
  int64_t key_width = given.key->size(-1), value_width = given.value->size(-1);
  TORCH_CHECK(given.flat() || (key_width == given.width() && value_width <= given.width()),
              "channels of query, key and value are ", given.width(), ", ", key_width, " and ", value_width,
              "; the first two must be equal and the third no larger");
  check_mask(given);
  require_type("sink", given.sink, {at::kFloat});
  TORCH_CHECK(!given.sink || given.sink->sizes() == at::IntArrayRef{given.heads}, "the sink is ",
              given.sink ? given.sink->sizes() : at::IntArrayRef(), " for ", given.heads, " heads");
  if (!given.varied()) return;
  TORCH_CHECK(!given.sink, "a sink in layout TND is not emulated");
  check_ends("actual_seq_qlen", given.query_ends, given.query->size(0));
  check_ends("actual_seq_kvlen", given.key_ends, given.key->size(0));
}

// The number of the sequence, and the place in it, of each of `count` tokens.
std::pair<at::Tensor, at::Tensor> sequences(const Integers* ends, int64_t count) {
  auto number = at::zeros({count}, at::kLong), place = at::arange(count, at::kLong);
  int64_t start = 0;
  for (size_t i = 0; ends && i < ends->size(); start = ends->at(i++)) {
    number.slice(0, start, ends->at(i)).fill_(static_cast<int64_t>(i));
    place.slice(0, start, ends->at(i)).sub_(start);
  }
  return {number, place};
}

// True where a query must not see a key; [S, T] or broadcastable to [B, N, S, T].
at::Tensor hidden(const Arguments& given, int64_t queries, int64_t keys) {
  auto [query_number, query_place] = sequences(given.query_ends, queries);
  auto [key_number, key_place] = sequences(given.key_ends, keys);
  auto result = query_number.unsqueeze(1) != key_number.unsqueeze(0);
  if (given.compressed()) {
    int64_t shift = given.sparse_mode == 3 && !given.varied() ? keys - queries : 0;
    result = result | (key_place.unsqueeze(0) > query_place.unsqueeze(1) + shift);
  } else if (given.mask) {
    result = result | given.mask->to(at::kBool);
  }
  return result;
}

at::Tensor sinks(const Arguments& given) { return as_float(given.sink).reshape({1, -1, 1, 1}); }

struct Scores {
  at::Tensor query, key, value, top, total, probabilities;  // top, total: of the softmax, [B, N, S, 1]
  int64_t group;                                            // query heads that share one key head
};

Scores scores(const Arguments& given) {
  auto wide = [&](Tensor x, int64_t channels) { return given.to_bnsd(as_float(x), channels); };
  int64_t key_heads = given.flat() ? given.key->size(2) / given.width() : 0;
  int64_t value_width = given.flat() ? given.value->size(2) / key_heads : given.value->size(-1);
  Scores result{
      wide(given.query, given.width()), wide(given.key, given.width()), wide(given.value, value_width), {}, {}, {}, 1};
  TORCH_CHECK(result.query.size(1) == given.heads && given.heads % result.key.size(1) == 0, "head_num is ", given.heads,
              "; query has ", result.query.size(1), " heads, key ", result.key.size(1));
  result.group = given.heads / result.key.size(1);
  result.key = result.key.repeat_interleave(result.group, 1);
  result.value = result.value.repeat_interleave(result.group, 1);
  auto logits = at::matmul(result.query, result.key.transpose(-1, -2)) * given.scale;
  logits.masked_fill_(hidden(given, logits.size(2), logits.size(3)), -1e30);
  result.top = logits.amax(-1, true);
  if (given.sink) result.top = at::maximum(result.top, sinks(given));
  auto weights = logits.sub_(result.top).exp_();
  result.total = weights.sum(-1, true);
  if (given.sink) result.total += (sinks(given) - result.top).exp();
  result.probabilities = weights.div_(result.total);
  return result;
}

// What the backward pass of the real operator needs: [B, N, S, 8] or, for layout TND, [T, N, 8], each number 8 times.
void store_statistics(const Arguments& given, const at::Tensor& statistic, Tensor out) {
  auto wide = statistic.expand({-1, -1, -1, 8});
  store(out, given.varied() ? wide.squeeze(0).transpose(0, 1) : wide);
}

void forward(const Arguments& given, Tensor top, Tensor total, Tensor out) {
  auto found = scores(given);
  store_statistics(given, found.top, top);
  store_statistics(given, found.total, total);
  store(out, given.from_bnsd(at::matmul(found.probabilities, found.value)));
}

void backward(const Arguments& given, Tensor grad, Tensor dq, Tensor dk, Tensor dv, Tensor d_sink) {
  auto found = scores(given);
  auto wide = given.to_bnsd(as_float(grad), found.value.size(3));
  auto d_probabilities = at::matmul(wide, found.value.transpose(-1, -2));
  auto inner = (d_probabilities * found.probabilities).sum(-1, true);
  auto shared = [&](const at::Tensor& x) {  // the gradients of the query heads that share a key head add up
    return x.reshape({x.size(0), -1, found.group, x.size(2), x.size(3)}).sum(2);
  };
  store(dv, given.from_bnsd(shared(at::matmul(found.probabilities.transpose(-1, -2), wide))));
  auto d_logits = d_probabilities.sub_(inner).mul_(found.probabilities).mul_(given.scale);
  store(dq, given.from_bnsd(at::matmul(d_logits, found.key)));
  store(dk, given.from_bnsd(shared(at::matmul(d_logits.transpose(-1, -2), found.query))));
  if (!given.sink) return;
  auto share = (sinks(given) - found.top).exp() / found.total;
  store(d_sink, -(share * inner).sum({0, 2, 3}));
}

void check_plain(Tensor shift, Tensor drop, Tensor padding, double keep) {
  TORCH_CHECK(!shift && !drop && !padding && keep == 1, "position shift, padding mask and dropout are not emulated");
}

}  // namespace

// What an operator has no parameter for is not given.
static constexpr Tensor sink{}, d_sink{};
static constexpr Integers *query_ends = nullptr, *key_ends = nullptr;

#define INPUTS Tensor query, Tensor key, Tensor value
#define MASKS Tensor shift, Tensor drop, Tensor padding, Tensor mask
#define OPTIONS double scale, double keep, int64_t, int64_t, int64_t heads, char *layout, int64_t, int64_t sparse_mode
#define OUTPUTS Tensor top, Tensor total, Tensor, Tensor out
#define SAVED Tensor, Tensor, Tensor, Tensor
#define GRADIENTS Tensor dq, Tensor dk, Tensor dv, Tensor
#define ATTENTION(NAME, PARAMETERS, ...)                                                                              \
  PREPARED(NAME, PARAMETERS,                                                                                          \
           Arguments given(query, key, value, mask, sink, query_ends, key_ends, scale, heads, sparse_mode, layout),   \
           (check_plain(shift, drop, padding, keep), check(given)), __VA_ARGS__)

ATTENTION(FlashAttentionScore, (INPUTS, MASKS, Integers*, OPTIONS, OUTPUTS), forward(given, top, total, out))
ATTENTION(FlashAttentionVarLenScore,
          (INPUTS, MASKS, Integers*, Integers* query_ends, Integers* key_ends, OPTIONS, OUTPUTS),
          forward(given, top, total, out))
ATTENTION(FlashAttentionScoreV3,
          (INPUTS, MASKS, Tensor sink, Integers*, Integers*, Integers*, OPTIONS, int64_t, OUTPUTS),
          forward(given, top, total, out))
ATTENTION(FlashAttentionScoreGrad, (INPUTS, Tensor grad, MASKS, SAVED, Integers*, OPTIONS, GRADIENTS),
          backward(given, grad, dq, dk, dv, d_sink))
ATTENTION(FlashAttentionUnpaddingScoreGrad,
          (INPUTS, Tensor grad, MASKS, SAVED, Integers*, Integers* query_ends, Integers* key_ends, OPTIONS, GRADIENTS),
          backward(given, grad, dq, dk, dv, d_sink))
ATTENTION(FlashAttentionScoreGradV3,
          (INPUTS, Tensor grad, MASKS, SAVED, Tensor sink, Integers*, Integers*, Integers*, OPTIONS, int64_t, GRADIENTS,
           Tensor d_sink),
          backward(given, grad, dq, dk, dv, d_sink))
