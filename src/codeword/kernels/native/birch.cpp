// The scan of BIRCH in one dimension: kernels/birch.py.
#include <limits>

#include "core.hpp"

namespace {

constexpr double INF = std::numeric_limits<double>::infinity();

struct Leaf {
    double mean, n, first, second;
};

// The first of leaves [0, count) whose mean is not below x, or count: looked for from `at` outwards.
int64_t find(const Leaf* leaves, int64_t count, int64_t at, double x) {
    int64_t low, high, step = 1;  // leaves before low are below x, high is not
    if (at < count && leaves[at].mean < x) {
        for (low = at + 1, high = low; high < count && leaves[high].mean < x; step *= 2) {
            low = high + 1;
            high = std::min(count, high + step);
        }
    } else {
        for (high = at, low = at; low > 0 && !(leaves[low - 1].mean < x); step *= 2) {
            high = low - 1;
            low = std::max<int64_t>(0, low - step);
        }
    }
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (leaves[middle].mean < x) low = middle + 1;
        else high = middle;
    }
    return low;
}

}  // namespace

// Takes values (n,) in turn, of importance (n,) or 1 each if null, until leaves (capacity,) are full; returns how many.
// rule: the squared radius that is allowed, where the hints (parts,) begin, and how many there are to a unit. leaves:
// `count` of them by rising mean, with one before and one after that are not in use otherwise.
CW_EXPORT int64_t cw_cluster_features(
    const double* values, const double* importance, int64_t n, const double* rule, int64_t* hints, int64_t parts,
    Leaf* leaves, int64_t capacity, int64_t* count) {
    const double limit = rule[0], low = rule[1], per_unit = rule[2], last = static_cast<double>(parts - 1);
    leaves += 1;
    leaves[-1].mean = -INF;
    leaves[*count].mean = INF;
    int64_t p = *count, i = 0;
    for (; i < n; ++i) {
        const double x = values[i], h = importance ? importance[i] : 1;
        if (!(h > 0)) continue;
        int64_t& hint = hints[static_cast<int64_t>(std::max(0.0, std::min((x - low) * per_unit, last)))];
        int64_t at = hint;
        if (!(leaves[at - 1].mean < x && x <= leaves[at].mean)) hint = at = find(leaves, p, at, x);
        const double hx = h * x, hxx = hx * x;
        if (p) {
            // Without a branch, which half of the values would take: a sentinel is never nearer, nor are both there.
            const bool lower = (at == p) | ((at > 0) & (x - leaves[at - 1].mean <= leaves[at].mean - x));
            Leaf& near = leaves[at - lower];
            const double sum = near.n + h, first = near.first + hx, second = near.second + hxx, mean = first / sum;
            if (second / sum - mean * mean <= limit) {
                near = {std::max(std::min(near.mean, x), std::min(std::max(near.mean, x), mean)), sum, first, second};
                continue;
            }
        }
        if (p + 3 > capacity) break;
        std::memmove(leaves + at + 1, leaves + at, (p + 1 - at) * sizeof(Leaf));
        leaves[at] = {x, h, hx, hxx};
        ++p;
    }
    *count = p;
    return i;
}
