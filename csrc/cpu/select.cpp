#include "fastmix/select.h"

#include <type_traits>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace fastmix::FASTMIX_ISA {
namespace {

constexpr int64_t kNumbersPerTask = 8192;  // below this another thread costs more than it saves

// Vectors of W lanes, W a power of two up to the register width: rows of few actions need short ones.
template <class T, int W>
struct ShortOf {
    typedef T type __attribute__((vector_size(W * sizeof(T))));
};
template <class T, int W>
using Short = typename ShortOf<T, W>::type;

template <class T>
inline constexpr Int<T> kLowestKey = sizeof(T) == 4 ? INT32_MIN : INT64_MIN;
template <class T>
inline constexpr Int<T> kHighestKey = sizeof(T) == 4 ? INT32_MAX : INT64_MAX;

// Integers in the order of the numbers, -0 equal to 0 and NaN above everything, as torch.argmax has it. No number maps to
// kLowestKey, which is left to actions that are not available.
template <class T, int W>
FASTMIX_INLINE Short<Int<T>, W> keys(Short<T, W> q) {
    const Short<T, W> positive_zero = q + T(0);
    Short<Int<T>, W> bits;
    std::memcpy(&bits, &positive_zero, sizeof(bits));
    bits ^= (bits >> (8 * static_cast<int>(sizeof(T)) - 1)) & kHighestKey<T>;
    return q != q ? kHighestKey<T> - Short<Int<T>, W>{} : bits;
}

template <class T, int W>
FASTMIX_INLINE Short<T, W> load_short(const T* p) {
    Short<T, W> v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}

struct Always {};  // the type of availability where every action is available

template <class T, class M, int W>
FASTMIX_INLINE Short<Int<T>, W> available_keys(const T* q, const M* avail, int64_t u) {
    const auto key = keys<T, W>(load_short<T, W>(q + u));
    if constexpr (std::is_same_v<M, Always>) {
        return key;
    } else {
        const auto yes = __builtin_convertvector(load_short<M, W>(avail + u) != M(0), Short<Int<T>, W>);
        return yes ? key : kLowestKey<T> - Short<Int<T>, W>{};
    }
}

template <class I, int W>
FASTMIX_INLINE I largest(Short<I, W> v) {
    if constexpr (W == 1) {
        return v[0];
    } else {
        Short<I, W / 2> low, high;
        std::memcpy(&low, &v, sizeof(low));
        std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
        return largest<I, W / 2>(low > high ? low : high);
    }
}

// Calls body(start) on chunks of W that cover [0, size), size >= W; the last one overlaps its neighbour where W does not
// divide the size.
template <int W, class Body>
FASTMIX_INLINE void cover(int64_t size, const Body& body) {
    int64_t start = 0;
    for (; start + W <= size; start += W) body(start);
    if (start < size) body(size - W);
}

// The available action of largest value, the lowest of equals; -1 where none is available.
template <class T, class M, int W>
FASTMIX_INLINE int64_t greedy_action(const T* q, const M* avail, int64_t actions) {
    using I = Int<T>;
    Short<I, W> best = kLowestKey<T> - Short<I, W>{};
    cover<W>(actions, [&](int64_t u) {
        const auto key = available_keys<T, M, W>(q, avail, u);
        best = best > key ? best : key;
    });
    const I top = largest<I, W>(best);
    if (top == kLowestKey<T>) return -1;
    Short<I, W> lane;
    for (int i = 0; i < W; ++i) lane[i] = static_cast<I>(-i);
    Short<I, W> first = kLowestKey<T> - Short<I, W>{};  // negated indices, so that the lowest index is the largest
    cover<W>(actions, [&](int64_t u) {
        const auto key = available_keys<T, M, W>(q, avail, u);
        const Short<I, W> index = lane - static_cast<I>(u);
        const auto hit = key == top ? index : kLowestKey<T> - Short<I, W>{};
        first = first > hit ? first : hit;
    });
    return -static_cast<int64_t>(largest<I, W>(first));
}

FASTMIX_INLINE int64_t offset(const RowStrides& strides, int64_t outer, int64_t inner) {
    return outer * strides.outer + inner * strides.inner;
}

template <class T, class M, int W>
SelectFaults forward_rows(const SelectForward<T>& p, int64_t begin, int64_t end) {
    SelectFaults faults;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t outer = row / p.inner, inner = row % p.inner;
        const T* qs = p.agent_qs + offset(p.agent_qs_strides, outer, inner);
        const M* avail = static_cast<const M*>(p.avail_actions) + offset(p.avail_strides, outer, inner);
        const T* target = p.target_qs == nullptr ? nullptr : p.target_qs + offset(p.target_strides, outer, inner);
        const int64_t* taken = p.actions == nullptr ? nullptr : p.actions + offset(p.actions_strides, outer, inner);
        bool complete = true, all_greedy = true;
        for (int64_t a = 0; a < p.n_agents; ++a) {
            const int64_t out = row * p.n_agents + a;
            const T* q = qs + a * p.agent_qs_strides.agent;
            const int64_t found = greedy_action<T, M, W>(q, avail + a * p.avail_strides.agent, p.n_actions);
            const int64_t greedy = found < 0 ? 0 : found;
            complete &= found >= 0;
            p.greedy_actions[out] = greedy;
            p.greedy_qs[out] = found < 0 ? p.unavailable : q[greedy];
            if (target != nullptr) {
                p.chosen_target_qs[out] = found < 0 ? p.unavailable : target[a * p.target_strides.agent + greedy];
            }
            if (taken != nullptr) {
                const int64_t action = taken[a * p.actions_strides.agent];
                const bool inside = action >= 0 && action < p.n_actions;
                if (!inside && faults.action_out_of_range < 0) faults.action_out_of_range = row;
                p.chosen_qs[out] = inside ? q[action] : T(0);
                all_greedy &= action == greedy;
            }
        }
        if (taken != nullptr) p.all_greedy[row] = all_greedy;
        if (!complete && p.mask != nullptr && p.mask[offset(p.mask_strides, outer, inner)] &&
            faults.nothing_available < 0) {
            faults.nothing_available = row;
        }
    }
    return faults;
}

// The widest vectors that a row of actions fills.
template <class T, class M>
SelectFaults forward_rows(const SelectForward<T>& p, int64_t begin, int64_t end) {
    if constexpr (lanes<T> >= 16) {
        if (p.n_actions >= 16) return forward_rows<T, M, 16>(p, begin, end);
    }
    if constexpr (lanes<T> >= 8) {
        if (p.n_actions >= 8) return forward_rows<T, M, 8>(p, begin, end);
    }
    if constexpr (lanes<T> >= 4) {
        if (p.n_actions >= 4) return forward_rows<T, M, 4>(p, begin, end);
    }
    return p.n_actions >= 2 ? forward_rows<T, M, 2>(p, begin, end) : forward_rows<T, M, 1>(p, begin, end);
}

template <class T>
SelectFaults forward_part(const SelectForward<T>& p, int64_t begin, int64_t end) {
    switch (p.avail_type) {
        case AvailType::boolean:
            return forward_rows<T, uint8_t>(p, begin, end);
        case AvailType::int32:
            return forward_rows<T, int32_t>(p, begin, end);
        case AvailType::int64:
            return forward_rows<T, int64_t>(p, begin, end);
        case AvailType::float32:
            return forward_rows<T, float>(p, begin, end);
        case AvailType::float64:
            return forward_rows<T, double>(p, begin, end);
        default:
            return forward_rows<T, Always>(p, begin, end);
    }
}

// Rows a thread should at least have.
int64_t grain(const SelectShape& p) { return kNumbersPerTask / (p.n_agents * p.n_actions + 1) + 1; }

template <class T>
SelectFaults forward(const SelectForward<T>& p) {
    constexpr int kParts = 256;
    SelectFaults parts[kParts];
    const int threads = p.threads < kParts ? p.threads : kParts;
    parallel_parts(p.outer * p.inner, threads, grain(p), [&](int64_t begin, int64_t end, int part) {
        parts[part] = forward_part(p, begin, end);
    });
    SelectFaults faults;
    for (const SelectFaults& part : parts) {  // in the order of the rows: the first fault wins
        if (faults.nothing_available < 0) faults.nothing_available = part.nothing_available;
        if (faults.action_out_of_range < 0) faults.action_out_of_range = part.action_out_of_range;
    }
    return faults;
}

template <class T>
void backward(const SelectBackward<T>& p) {
    const int64_t row_size = p.n_agents * p.n_actions;
    parallel_parts(p.outer * p.inner, p.threads, grain(p), [&](int64_t begin, int64_t end, int) {
        for (int64_t row = begin; row < end; ++row) {
            const int64_t outer = row / p.inner, inner = row % p.inner;
            T* grad = p.grad_agent_qs + row * row_size;
            std::memset(grad, 0, static_cast<size_t>(row_size) * sizeof(T));
            if (p.grad_greedy_qs != nullptr) {
                const T* incoming = p.grad_greedy_qs + offset(p.grad_greedy_strides, outer, inner);
                for (int64_t a = 0; a < p.n_agents; ++a) {
                    const int64_t in = row * p.n_agents + a;
                    if (p.greedy_qs[in] == p.unavailable) continue;
                    grad[a * p.n_actions + p.greedy_actions[in]] += incoming[a * p.grad_greedy_strides.agent];
                }
            }
            if (p.grad_chosen_qs != nullptr) {
                const T* incoming = p.grad_chosen_qs + offset(p.grad_chosen_strides, outer, inner);
                const int64_t* taken = p.actions + offset(p.actions_strides, outer, inner);
                for (int64_t a = 0; a < p.n_agents; ++a) {
                    const int64_t action = taken[a * p.actions_strides.agent];
                    if (action < 0 || action >= p.n_actions) continue;  // the tensor was changed after the forward pass
                    grad[a * p.n_actions + action] += incoming[a * p.grad_chosen_strides.agent];
                }
            }
        }
    });
}

}  // namespace

SelectFaults select_forward(const SelectForward<float>& p) { return forward(p); }
SelectFaults select_forward(const SelectForward<double>& p) { return forward(p); }
void select_backward(const SelectBackward<float>& p) { backward(p); }
void select_backward(const SelectBackward<double>& p) { backward(p); }

}  // namespace fastmix::FASTMIX_ISA
