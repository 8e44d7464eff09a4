#include "fastmix/prey.h"

#include <cstring>

#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace fastmix::FASTMIX_ISA {
namespace {

constexpr int64_t kCopiesPerThread = 8;  // below this another thread costs more than it saves
constexpr int64_t kNowhere = -1;
constexpr int64_t kDelta[4][2] = {{0, 1}, {1, 0}, {0, -1}, {-1, 0}};

// xoshiro256++ of D. Blackman and S. Vigna: four words of state in the copy's own row.
class Random {
 public:
  explicit Random(uint64_t* state) : s_(state) {}

  uint64_t next() {
    const uint64_t result = rotate(s_[0] + s_[3], 23) + s_[0];
    const uint64_t shifted = s_[1] << 17;
    s_[2] ^= s_[0];
    s_[3] ^= s_[1];
    s_[1] ^= s_[2];
    s_[0] ^= s_[3];
    s_[2] ^= shifted;
    s_[3] = rotate(s_[3], 45);
    return result;
  }

  // Uniform on 0..n-1, exactly (D. Lemire's multiplication with rejection); n < 2^32.
  int64_t below(int64_t n) {
    const auto bound = static_cast<uint32_t>(n);
    uint64_t product = (next() >> 32) * bound;
    if (static_cast<uint32_t>(product) < bound) {
      const uint32_t threshold = static_cast<uint32_t>(-bound) % bound;
      while (static_cast<uint32_t>(product) < threshold) product = (next() >> 32) * bound;
    }
    return static_cast<int64_t>(product >> 32);
  }

  double uniform() { return static_cast<double>(next() >> 11) * 0x1.0p-53; }

  void shuffle(int16_t* order, int64_t n) {
    for (int64_t i = 0; i < n; ++i) order[i] = static_cast<int16_t>(i);
    for (int64_t i = n - 1; i > 0; --i) {
      const int64_t j = below(i + 1);
      const int16_t kept = order[i];
      order[i] = order[j];
      order[j] = kept;
    }
  }

 private:
  static uint64_t rotate(uint64_t x, int k) { return (x << k) | (x >> (64 - k)); }

  uint64_t* s_;
};

// One copy of the game, with a map of how many of each kind stand on each cell.
class Game {
 public:
  Game(const PreyRules& rules, const PreyCopies& p, Scratch& scratch)
      : r_(rules),
        p_(p),
        view_cols_(rules.cols + 2 * rules.window_cols),
        view_size_((rules.rows + 2 * rules.window_rows) * view_cols_ * 3),
        map_(scratch.take<uint8_t>(rules.cells() * 3)),
        seen_(scratch.take<uint8_t>(rules.agents)),
        blank_(scratch.take<float>(view_size_)),
        view_(scratch.take<float>(view_size_)) {
    std::memset(blank_, 0, sizeof(float) * static_cast<size_t>(view_size_));
    if (!r_.observe_walls || r_.toroidal) return;
    for (int64_t row = 0; row < r_.rows + 2 * r_.window_rows; ++row) {
      for (int64_t col = 0; col < view_cols_; ++col) {
        const bool inside = row >= r_.window_rows && row < r_.window_rows + r_.rows && col >= r_.window_cols &&
                            col < r_.window_cols + r_.cols;
        if (!inside) blank_[(row * view_cols_ + col) * 3] = -1;
      }
    }
  }

  void select(int64_t copy) {
    copy_ = copy;
    agent_pos_ = p_.agent_pos + copy * r_.agents * 2;
    active_ = p_.agent_active + copy * r_.agents;
    prey_pos_ = p_.prey_pos + copy * r_.prey() * 2;
    alive_ = p_.prey_alive + copy * r_.prey();
  }

  void reset() {
    Random random(p_.rng + copy_ * kPreyRngWords);
    std::memset(map_, 0, static_cast<size_t>(r_.cells()) * 3);
    for (int64_t i = 0; i < r_.agents; ++i) {
      spawn(random, agent_pos_ + 2 * i, 0);
      active_[i] = true;
    }
    for (int64_t i = 0; i < r_.prey(); ++i) {
      spawn(random, prey_pos_ + 2 * i, kind(i));
      alive_[i] = true;
    }
    p_.steps[copy_] = 0;
    p_.terminated[copy_] = p_.truncated[copy_] = false;
  }

  // Returns whether the decisions were possible; they always are where they are drawn.
  bool step(const int64_t* actions, bool replay) {
    Random random(p_.rng + copy_ * kPreyRngWords);
    int16_t* agent_order = p_.agent_order + copy_ * r_.agents;
    int16_t* prey_order = p_.prey_order + copy_ * r_.prey();
    int16_t* moves = p_.prey_move + copy_ * r_.prey();
    if (!replay) {
      random.shuffle(agent_order, r_.agents);
      random.shuffle(prey_order, r_.prey());
    } else if (!is_order(agent_order, r_.agents) || !is_order(prey_order, r_.prey())) {
      return false;
    }
    fill_map();
    reward_ = r_.reward_time;
    for (int64_t i = 0; i < r_.agents; ++i) move_agent(agent_order[i], actions[agent_order[i]]);
    bool possible = true, caught_terminal = false;
    for (int64_t i = 0; i < r_.prey() && possible; ++i) {
      const int64_t prey = prey_order[i];
      const int16_t move = decide(prey, actions, random, replay, moves[prey]);
      caught_terminal |= move == kPreyCaptured && r_.capture_terminal;
      possible = !replay || move == moves[prey];
      moves[prey] = move;
    }
    const bool over = caught_terminal || !any(alive_, r_.prey()) || !any(active_, r_.agents);
    p_.reward[copy_] = reward_;
    p_.terminated[copy_] = over;
    p_.truncated[copy_] = ++p_.steps[copy_] >= r_.episode_limit;
    return possible;
  }

  void observe() {
    float* state = p_.state + copy_ * r_.state_dim();
    std::memset(state, 0, sizeof(float) * static_cast<size_t>(r_.state_dim()));
    std::memcpy(view_, blank_, sizeof(float) * static_cast<size_t>(view_size_));
    for (int64_t i = 0; i < r_.agents; ++i) {
      if (on_grid(i)) state[cell(agent_pos_ + 2 * i) * 3] = 1;
      if (active_[i]) show(agent_pos_ + 2 * i, 0, i);
    }
    for (int64_t i = 0; i < r_.prey(); ++i) {
      if (!alive_[i]) continue;
      state[cell(prey_pos_ + 2 * i) * 3 + kind(i)] = 1;
      show(prey_pos_ + 2 * i, kind(i), i);
    }
    for (int64_t i = 0; i < r_.agents; ++i) {
      look(i, p_.obs + (copy_ * r_.agents + i) * r_.obs_dim());
      permit(i, p_.avail + (copy_ * r_.agents + i) * r_.actions());
    }
  }

 private:
  int64_t kind(int64_t prey) const { return prey < r_.stags ? 1 : 2; }
  int64_t cell(const int32_t* pos) const { return pos[0] * r_.cols + pos[1]; }
  bool on_grid(int64_t agent) const { return active_[agent] || !r_.remove_frozen; }
  static bool any(const bool* flags, int64_t n) { return n > 0 && std::memchr(flags, 1, static_cast<size_t>(n)); }

  bool is_order(const int16_t* order, int64_t n) {
    uint8_t* seen = n <= r_.agents ? seen_ : map_;  // the map is filled later; there is a cell for every prey
    std::memset(seen, 0, static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) {
      if (order[i] < 0 || order[i] >= n || seen[order[i]]++) return false;
    }
    return true;
  }

  void spawn(Random& random, int32_t* pos, int64_t channel) {
    do {
      pos[0] = static_cast<int32_t>(random.below(r_.rows));
      pos[1] = static_cast<int32_t>(random.below(r_.cols));
    } while (occupied(cell(pos)));
    ++map_[cell(pos) * 3 + channel];
  }

  bool occupied(int64_t at) const { return map_[at * 3] || map_[at * 3 + 1] || map_[at * 3 + 2]; }

  void fill_map() {
    std::memset(map_, 0, static_cast<size_t>(r_.cells()) * 3);
    for (int64_t i = 0; i < r_.agents; ++i) {
      if (on_grid(i)) ++map_[cell(agent_pos_ + 2 * i) * 3];
    }
    for (int64_t i = 0; i < r_.prey(); ++i) {
      if (alive_[i]) ++map_[cell(prey_pos_ + 2 * i) * 3 + kind(i)];
    }
  }

  // The cell next to `pos` in a direction, or kNowhere beyond the border of a bounded world.
  int64_t next_to(const int32_t* pos, int64_t direction) const {
    int64_t row = pos[0] + kDelta[direction][0], col = pos[1] + kDelta[direction][1];
    if (r_.toroidal) {
      row = row < 0 ? r_.rows - 1 : row == r_.rows ? 0 : row;
      col = col < 0 ? r_.cols - 1 : col == r_.cols ? 0 : col;
    } else if (row < 0 || row >= r_.rows || col < 0 || col >= r_.cols) {
      return kNowhere;
    }
    return row * r_.cols + col;
  }

  void place(int32_t* pos, int64_t at) const {
    pos[0] = static_cast<int32_t>(at / r_.cols);
    pos[1] = static_cast<int32_t>(at % r_.cols);
  }

  // Near enough to catch: the public code does not look across the border of a toroidal world.
  bool adjacent(const int32_t* a, const int32_t* b) const {
    int64_t down = a[0] < b[0] ? b[0] - a[0] : a[0] - b[0], across = a[1] < b[1] ? b[1] - a[1] : a[1] - b[1];
    if (r_.toroidal && !r_.released) {
      down = down < r_.rows - down ? down : r_.rows - down;
      across = across < r_.cols - across ? across : r_.cols - across;
    }
    return down + across == 1;
  }

  void move_agent(int64_t agent, int64_t action) {
    if (!active_[agent]) return;
    int32_t* pos = agent_pos_ + 2 * agent;
    const int64_t from = cell(pos);
    int64_t to = action < kPreyStay ? next_to(pos, action) : from;
    if (to == kNowhere) to = from;
    if (to == from) {
      // There it is itself, with which the public code has it collide.
      if (r_.released && blocked(to)) reward_ += r_.reward_collision;
    } else if (blocked(to)) {
      reward_ += r_.reward_collision;
    } else {
      --map_[from * 3];
      ++map_[to * 3];
      place(pos, to);
    }
  }

  bool blocked(int64_t at) const {
    for (int64_t channel = 0; channel < 3; ++channel) {
      if (r_.blocks[channel] && map_[at * 3 + channel]) return true;
    }
    return false;
  }

  // What becomes of a prey, done at once. `recorded` is what a replayed step says.
  int16_t decide(int64_t prey, const int64_t* actions, Random& random, bool replay, int16_t recorded) {
    if (!alive_[prey]) return kPreyGone;
    int32_t* pos = prey_pos_ + 2 * prey;
    const int64_t from = cell(pos), type = kind(prey) - 1;
    int64_t free[4], n_free = 0;
    int16_t directions[4];
    bool touched = false;
    for (int16_t d = 0; d < 4; ++d) {
      const int64_t at = next_to(pos, d);
      if (at == kNowhere) continue;
      touched |= map_[at * 3] > 0;
      if (occupied(at)) continue;
      directions[n_free] = d;
      free[n_free++] = at;
    }
    bool captured;
    if (r_.capture_action) {
      int64_t catchers = 0;
      for (int64_t i = 0; i < r_.agents; ++i) catchers += catches(i, pos, actions);
      captured = catchers >= r_.capture_action_conditions[type];
      if (catchers > 0 && !captured) reward_ += r_.miscapture_punishment;
    } else {
      captured = n_free <= r_.capture_conditions[type];
    }
    if (captured && (touched || !r_.prevent_cannibalism)) {
      remove(prey, actions);
      return kPreyCaptured;
    }
    if (n_free == 0) return kPreyStayed;
    int64_t chosen = 0;
    if (replay) {
      while (chosen < n_free && directions[chosen] != recorded) ++chosen;
      if (chosen == n_free) return kPreyStayed;
    } else {
      if (r_.rest[type] > 0 && random.uniform() < r_.rest[type]) return kPreyStayed;
      chosen = random.below(n_free);
    }
    --map_[from * 3 + kind(prey)];
    ++map_[free[chosen] * 3 + kind(prey)];
    place(pos, free[chosen]);
    return directions[chosen];
  }

  bool catches(int64_t agent, const int32_t* prey_pos, const int64_t* actions) const {
    return active_[agent] && (!r_.capture_action || actions[agent] == kPreyCatch) &&
           adjacent(agent_pos_ + 2 * agent, prey_pos);
  }

  void remove(int64_t prey, const int64_t* actions) {
    const int32_t* pos = prey_pos_ + 2 * prey;
    alive_[prey] = false;
    --map_[cell(pos) * 3 + kind(prey)];
    reward_ += r_.reward[kind(prey) - 1];
    if (!r_.capture_freezes) return;
    for (int64_t i = 0; i < r_.agents; ++i) {
      if (!catches(i, pos, actions)) continue;
      active_[i] = false;
      if (r_.remove_frozen) --map_[cell(agent_pos_ + 2 * i) * 3];
    }
  }

  // Into the view, which is the world with a border as wide as a window; in a toroidal world the border repeats it.
  void show(const int32_t* pos, int64_t channel, int64_t index) {
    const float mark = r_.observe_ids ? static_cast<float>(index + 1) : 1.0F;
    if (!r_.toroidal || r_.released) {
      view_[((pos[0] + r_.window_rows) * view_cols_ + pos[1] + r_.window_cols) * 3 + channel] = mark;
      return;
    }
    for (int64_t row = (pos[0] + r_.window_rows) % r_.rows; row < r_.rows + 2 * r_.window_rows; row += r_.rows) {
      for (int64_t col = (pos[1] + r_.window_cols) % r_.cols; col < view_cols_; col += r_.cols) {
        view_[(row * view_cols_ + col) * 3 + channel] = mark;
      }
    }
  }

  void look(int64_t agent, float* obs) const {
    if (!active_[agent] && r_.capture_freezes && r_.remove_frozen) {
      std::memset(obs, 0, sizeof(float) * static_cast<size_t>(r_.obs_dim()));
      return;
    }
    // A window's rows are pieces of the view's; its corner has the agent's own coordinates there.
    const int32_t* pos = agent_pos_ + 2 * agent;
    const int64_t width = (2 * r_.window_cols + 1) * 3;
    for (int64_t row = 0; row <= 2 * r_.window_rows; ++row) {
      const float* from = view_ + ((pos[0] + row) * view_cols_ + pos[1]) * 3;
      std::memcpy(obs + row * width, from, sizeof(float) * static_cast<size_t>(width));
    }
  }

  void permit(int64_t agent, bool* avail) const {
    std::memset(avail, 0, static_cast<size_t>(r_.actions()));
    avail[kPreyStay] = true;
    if (!active_[agent]) return;
    const int32_t* pos = agent_pos_ + 2 * agent;
    for (int64_t d = 0; d < 4; ++d) avail[d] = next_to(pos, d) != kNowhere;
    if (!r_.capture_action) return;
    for (int64_t i = 0; i < r_.prey() && !avail[kPreyCatch]; ++i) {
      avail[kPreyCatch] = alive_[i] && adjacent(pos, prey_pos_ + 2 * i);
    }
  }

  const PreyRules& r_;
  const PreyCopies& p_;
  const int64_t view_cols_, view_size_;
  uint8_t* map_;  // [cells, 3]
  uint8_t* seen_;
  float* blank_;  // a view of an empty world
  float* view_;
  int64_t copy_ = 0;
  int32_t* agent_pos_ = nullptr;
  bool* active_ = nullptr;
  int32_t* prey_pos_ = nullptr;
  bool* alive_ = nullptr;
  float reward_ = 0;
};

// Calls body(game, i) for i in [0, count), the copies shared out among threads. A copy's numbers come from its own
// generator, so the number of threads changes nothing.
template <class Body>
void for_each(const PreyRules& rules, const PreyCopies& p, int64_t count, int threads, const Body& body) {
  parallel_parts(count, threads, kCopiesPerThread, [&](int64_t begin, int64_t end, int) {
    Scratch scratch;
    Game game(rules, p, scratch);
    for (int64_t i = begin; i < end; ++i) body(game, i);
  });
}

}  // namespace

void prey_reset(const PreyRules& rules, const PreyCopies& p, const int64_t* indices, int64_t count, int threads) {
  for_each(rules, p, count, threads, [&](Game& game, int64_t i) {
    game.select(indices[i]);
    game.reset();
    game.observe();
  });
}

void prey_observe(const PreyRules& rules, const PreyCopies& p, int threads) {
  for_each(rules, p, p.copies, threads, [&](Game& game, int64_t i) {
    game.select(i);
    game.observe();
  });
}

int64_t prey_step(const PreyRules& rules, const PreyCopies& p, const int64_t* actions, bool replay, int threads) {
  // A replay is looked at copy by copy, by one thread: it is a check, not something that has to be fast.
  int64_t impossible = -1;
  for_each(rules, p, p.copies, replay ? 1 : threads, [&](Game& game, int64_t i) {
    game.select(i);
    const bool possible = game.step(actions + i * rules.agents, replay);
    if (!possible && impossible < 0) impossible = i;
    game.observe();
  });
  return impossible;
}

}  // namespace fastmix::FASTMIX_ISA
