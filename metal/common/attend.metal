// A few rows of queries over a stretch of keys, by groups of simdgroups each of which takes keys of its own: what attention
// of few queries is made of. Nothing here is shared but what `finish` adds up, so keys and values are read once, straight
// into registers, with those of the next keys in flight.
//
// Rows are queries of all heads that share keys: row r is query r / heads of head r % heads. A score is a power of two:
// RATE and CAP hold a factor of 1 / ln 2.

// The rows that a group works on, of one sequence and one head of keys.
struct Span {
  int first;       // row
  int count;       // rows there are
  int heads;       // that share keys
  int offset;      // position of query 0 among the keys
  int keys;        // keys there are
  uint output;     // where row 0 goes
  uint head_step;  // from there to the next head
  uint query_step;
};

// What a row may see, keys low to high - 1, and where it is among them.
struct Row {
  int position;
  int low;
  int high;
  float slope;
};

// Distances from a position are passed as what is above FAR below, for no constant may be negative.
constant constexpr const int FAR = 1 << 30;

METAL_FUNC int clamped(int value, int low, int high) {
  return value < low ? low : value > high ? high : value;
}

// The position less `left`, or plus `right`, and one of them FAR away is none.
METAL_FUNC int low_of(int position, int left, int keys) {
  return clamped(position - (left - FAR), 0, keys);
}
METAL_FUNC int high_of(int position, int right, int keys) {
  const int reach = right - FAR;
  return reach >= FAR - 1 ? keys : clamped(position + reach + 1, 0, keys);
}

template <int LEFT, int RIGHT>
METAL_FUNC Row row_of(Span span, int r) {
  Row row;
  const int index = span.first + r;
  row.position = span.offset + index / span.heads;
  row.low = low_of(row.position, LEFT, span.keys);
  row.high = index < span.count ? high_of(row.position, RIGHT, span.keys) : 0;
  row.slope = 0.0f;
  return row;
}

// Where the results of a row go, counted in rows.
METAL_FUNC size_t output_of(Span span, int r) {
  const int index = span.first + r;
  return span.output + uint(index % span.heads) * span.head_step + uint(index / span.heads) * span.query_step;
}

// Keys from first to end - 1.
struct Stretch {
  uint first;
  uint end;
};

// Of the keys that any row of the group sees, part `split` of `splits`, in whole steps of `step` keys. It begins with a
// multiple of KEYS, of which the first few may be hidden.
template <int LEFT, int RIGHT, int KEYS>
METAL_FUNC Stretch stretch_of(Span span, int rows, uint split, uint splits, uint step) {
  const int last = (span.first + rows < span.count ? span.first + rows : span.count) - 1;
  const int low = low_of(span.offset + span.first / span.heads, LEFT, span.keys) / KEYS * KEYS;
  const int high = high_of(span.offset + last / span.heads, RIGHT, span.keys);
  const uint count = high > low ? high - low : 0;
  const uint steps = (count + step - 1) / step;
  const uint part = (steps + splits - 1) / splits * step;
  const uint first = split * part;
  Stretch stretch;
  stretch.first = low + (first < count ? first : count);
  stretch.end = low + (first + part < count ? first + part : count);
  return stretch;
}

METAL_FUNC float scored(float product, float rate, float cap) {
  return cap == 0.0f ? product * rate : cap * metal::tanh(product * rate);
}

METAL_FUNC float power(float score, float peak) {
  return metal::fast::exp2(score - base_of(peak));
}

// A score, hidden where the row may not see its key or another simdgroup does.
METAL_FUNC float seen(float score, Row row, uint key, uint end) {
  const bool visible = int(key) >= row.low && int(key) < row.high && key < end;
  const int distance = row.position - int(key);
  return visible ? score - row.slope * float(distance < 0 ? -distance : distance) : -INFINITY;
}

// ---- where keys or values lie

// In an array, `row_step` elements apart, and those of a row `step` apart.
template <typename Pointer>
struct Cached {
  Pointer start;
  long row_step;
  long step;

  // KEYS keys from `first`, a multiple of that, are asked for next; a source may want to know.
  template <int KEYS>
  METAL_FUNC void turn_to(uint) {}

  template <int KEYS>
  METAL_FUNC Pointer row(uint key) const { return start + long(key) * row_step; }
  METAL_FUNC float scale(uint) const { return 1.0f; }
};
