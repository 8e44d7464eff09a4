// Predator-prey (stag hunt): copies of one game, stepped together. The rules are those of
// fastmix/envs/prey/reference.py.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace fastmix {

inline constexpr int kPreyStay = 4;   // actions 0..3 move right, down, left, up
inline constexpr int kPreyCatch = 5;  // only with capture_action
inline constexpr int kPreyRngWords = 4;

// What a prey did in a step, where it did not move in a direction 0..3.
enum PreyMove : int16_t { kPreyStayed = -1, kPreyCaptured = -2, kPreyGone = -3 };

struct PreyRules {
  int64_t rows, cols, agents, stags, hares;
  int64_t window_rows, window_cols;  // half-widths of an observation
  int64_t episode_limit;
  bool toroidal, capture_action, capture_freezes, capture_terminal, remove_frozen, prevent_cannibalism;
  bool observe_walls, observe_ids;
  bool released;                         // quirks of the public code, see PreyRules in Python
  bool blocks[3];                        // what an agent cannot walk into: agents, stags, hares
  int64_t capture_conditions[2];         // stag, hare: captured with at most so many free cells around it
  int64_t capture_action_conditions[2];  // stag, hare: captured by at least so many catchers
  double rest[2];                        // stag, hare: probability of not moving
  float reward[2];                       // stag, hare
  float reward_time, reward_collision, miscapture_punishment;

  int64_t prey() const { return stags + hares; }
  int64_t cells() const { return rows * cols; }
  int64_t actions() const { return capture_action ? 6 : 5; }
  int64_t state_dim() const { return cells() * 3; }
  int64_t obs_dim() const { return (2 * window_rows + 1) * (2 * window_cols + 1) * 3; }
};

// All arrays are dense; E copies, A agents, M prey.
struct PreyCopies {
  int64_t copies;
  int32_t* agent_pos;  // [E, A, 2] row and column
  bool* agent_active;  // [E, A] not frozen
  int32_t* prey_pos;   // [E, M, 2]
  bool* prey_alive;    // [E, M]
  int64_t* steps;      // [E]
  uint64_t* rng;       // [E, kPreyRngWords]
  float* obs;          // [E, A, O]
  float* state;        // [E, S]
  bool* avail;         // [E, A, U]
  float* reward;       // [E]
  bool* terminated;    // [E]
  bool* truncated;     // [E]
  // What chance decided in the last step. A replayed step reads the first two, and prey_move where a prey lives on.
  int16_t* agent_order;  // [E, A]
  int16_t* prey_order;   // [E, M]
  int16_t* prey_move;    // [E, M] a direction, or a PreyMove
};

FASTMIX_DECLARE(void prey_reset(const PreyRules& rules, const PreyCopies& p, const int64_t* indices, int64_t count,
                                int threads))
// Writes obs, state and avail of all copies anew, from positions.
FASTMIX_DECLARE(void prey_observe(const PreyRules& rules, const PreyCopies& p, int threads))
// `actions [E, A]`, each in [0, rules.actions()). A replayed step returns the first copy in which the recorded
// decisions cannot be (an order that is none, a move to where there is no room, another fate of a prey), else -1.
FASTMIX_DECLARE(int64_t prey_step(const PreyRules& rules, const PreyCopies& p, const int64_t* actions, bool replay,
                                  int threads))

}  // namespace fastmix
