// Exact one-dimensional k-means of many groups, each on its own: kernels/groups.py says how. In double precision.
#include <cmath>
#include <limits>

#include "core.hpp"

namespace {

constexpr double INF = std::numeric_limits<double>::infinity();
constexpr double LEAST_SHARE = 1e-280, MOST_SHARE = 1e280;
constexpr int64_t COARSE = 64, COARSE_PER_CLUSTER = 6;
constexpr int MODEL_TURNS = 8;

using Edges = std::vector<int32_t>;

int64_t links(const Edges& edges) { return static_cast<int64_t>(edges.size()) - 1; }

struct Sums {
    const double *s0, *s1, *s2;
    CW_INLINE double cost(int64_t i, int64_t j) const {
        const double w = s0[j] - s0[i], first = s1[j] - s1[i], second = s2[j] - s2[i];
        const double cost = second - first * first / w;
        return j - i > 1 && w > 0 && cost > 0 ? cost : 0.0;
    }
};

// The number of codewords by what one is worth; room for up to `most` items.
class Search {
   public:
    explicit Search(int64_t most)
        : layer_(most + 1), share_(most + 1), coarse_(3 * (most + 2)), places_(most + 2), arg_(most + 1),
          from_(most + 1), since_(most + 1) {
        for (Edges* edges : {&edges_, &few_, &many_}) edges->reserve(most + 1);
    }

    // The edges of the best clustering of d > k > 1 items into k.
    const Edges& best(const Sums& sums, const double* values, int64_t d, int64_t k) {
        spread(sums, values, d);
        const int64_t most = std::max(COARSE, COARSE_PER_CLUSTER * k);
        double price = guess(sums, d, k);
        if (d >= 2 * most && share_[d - 1] > LEAST_SHARE && share_[d - 1] < MOST_SHARE) {
            Sums fewer;
            const int64_t count = merge(sums, values, d, most, fewer);
            spread(fewer, places_.data(), count);
            price = search(fewer, count, k, guess(fewer, count, k), k / 16);
        }
        search(sums, d, k, price, 0);
        return edges_;
    }

   private:
    void spread(const Sums& sums, const double* values, int64_t d) {
        double total = 0;
        share_[0] = 0;
        for (int64_t i = 1; i < d; ++i) {
            total += std::sqrt((values[i] - values[i - 1]) * std::sqrt(sums.s0[i] - sums.s0[i - 1]));
            share_[i] = total;
        }
    }

    double guess(const Sums& sums, int64_t d, int64_t k) const {
        const double clusters = static_cast<double>(k), step = share_[d - 1] / clusters;
        if (!(step > LEAST_SHARE)) return sums.cost(0, d) / clusters;
        double next = step, error = 0;
        int64_t from = 0;
        for (int64_t i = 1; i < d; ++i) {
            if (share_[i] < next) continue;
            error += sums.cost(from, i);
            from = i;
            next = (std::floor(share_[i] / step) + 1) * step;
        }
        error += sums.cost(from, d);
        return 2 * error / clusters;
    }

    int64_t merge(const Sums& sums, const double* values, int64_t d, int64_t most, Sums& fewer) {
        const double half = static_cast<double>(most) / 2;
        const double by_share = half / share_[d - 1], by_index = half / static_cast<double>(d);
        double *s0 = coarse_.data(), *s1 = s0 + most + 2, *s2 = s1 + most + 2, next = 0;
        int64_t count = 0;
        for (int64_t i = 0; i <= d; ++i) {
            if (i < d) {
                const double here = share_[i] * by_share + static_cast<double>(i) * by_index;
                if (here < next) continue;
                next = std::floor(here) + 1;
                places_[count] = values[i];
            }
            s0[count] = sums.s0[i], s1[count] = sums.s1[i], s2[count] = sums.s2[i];
            ++count;
        }
        fewer = {s0, s1, s2};
        return count - 1;
    }

    double search(const Sums& sums, int64_t d, int64_t k, double price, int64_t close) {
        few_.assign({0, static_cast<int32_t>(d)});
        many_.resize(d + 1);
        for (int64_t i = 0; i <= d; ++i) many_[i] = static_cast<int32_t>(i);
        double few_error = sums.cost(0, d), many_error = 0, low = 0, high = INF;
        bool chord = false;
        for (int turn = 0;; ++turn) {
            solve(sums, d, price);
            const int64_t found = links(edges_);
            const double ratio = static_cast<double>(found) / static_cast<double>(k);
            const double model = price * ratio * ratio * ratio;
            if (std::abs(found - k) <= close) return model;
            if (links(few_) < found && found < links(many_)) {
                double error = 0;
                for (int64_t i = 0; i < found; ++i) error += sums.cost(edges_[i], edges_[i + 1]);
                (found < k ? few_ : many_).swap(edges_);
                (found < k ? few_error : many_error) = error;
            } else if (chord) {
                splice(k);
                return price;
            }
            (found < k ? high : low) = price;
            chord = !(turn < MODEL_TURNS && low < model && model < high);
            price = chord ? (few_error - many_error) / static_cast<double>(links(many_) - links(few_)) : model;
        }
    }

    void solve(const Sums& p, int64_t d, double price) {
        double* layer = layer_.data();
        layer[0] = 0;
        from_[0] = 0, since_[0] = 1;
        int64_t head = 0, tail = 1;
        for (int64_t j = 1; j <= d; ++j) {
            while (head + 1 < tail && since_[head + 1] <= j) ++head;
            const int64_t best = from_[head];
            layer[j] = layer[best] + p.cost(best, j) + price;
            arg_[j] = static_cast<int32_t>(best);
            if (j == d) break;
            auto better = [&](int64_t than, int64_t at) {
                return layer[j] + p.cost(j, at) < layer[than] + p.cost(than, at);
            };
            int64_t at = j + 1;
            while (tail > head) {
                at = std::max<int64_t>(since_[tail - 1], j + 1);
                if (!better(from_[tail - 1], at)) break;
                --tail;
            }
            if (tail == head) {
                at = j + 1;
            } else {
                const int64_t than = from_[tail - 1];
                at = first_better(at, d, [&](int64_t place) { return better(than, place); });
            }
            if (at <= d) from_[tail] = static_cast<int32_t>(j), since_[tail] = static_cast<int32_t>(at), ++tail;
        }
        edges_.clear();
        for (int64_t j = d; j > 0; j = arg_[j]) edges_.push_back(static_cast<int32_t>(j));
        edges_.push_back(0);
        std::reverse(edges_.begin(), edges_.end());
    }

    // The first place after `low` that is better, last + 1 if none is.
    template <class Better>
    static int64_t first_better(int64_t low, int64_t last, Better better) {
        int64_t high = last + 1;
        for (int64_t step = 1; low + step < high; step *= 2) {
            if (better(low + step)) {
                high = low + step;
                break;
            }
            low += step;
        }
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (better(middle) ? high : low) = middle;
        }
        return high;
    }

    void splice(int64_t k) {
        const int64_t shift = links(many_) - k;
        int64_t x = 0;
        while (many_[x + shift + 1] > few_[x + 1]) ++x;
        edges_.assign(few_.begin(), few_.begin() + x + 1);
        edges_.insert(edges_.end(), many_.begin() + x + shift + 1, many_.end());
    }

    std::vector<double> layer_, share_, coarse_, places_;
    std::vector<int32_t> arg_, from_, since_;
    Edges edges_, few_, many_;
};

// Sorts keys in the upper halves of items, stably, from the lowest byte up; spare is as long.
void sort_keys(std::vector<uint64_t>& items, std::vector<uint64_t>& spare) {
    int64_t seen[4][256] = {};
    for (const uint64_t item : items)
        for (int byte = 0; byte < 4; ++byte) ++seen[byte][item >> (32 + 8 * byte) & 255];
    for (int byte = 0; byte < 4; ++byte) {
        const int shift = 32 + 8 * byte;
        int64_t* at = seen[byte];
        if (at[items[0] >> shift & 255] == static_cast<int64_t>(items.size())) continue;  // all alike
        int64_t before = 0;
        for (int digit = 0; digit < 256; ++digit) {
            const int64_t here = at[digit];
            at[digit] = before;
            before += here;
        }
        for (const uint64_t item : items) spare[at[item >> shift & 255]++] = item;
        items.swap(spare);
    }
}

// One group after another of up to m values, with all the room that takes.
class Clustering {
   public:
    Clustering(int64_t m, int64_t k)
        : k_(k), search_(m), items_(m), spare_(m), distinct_(m), weight_(m), known_(m), mass_(m), prefix_(3 * (m + 1)),
          offsets_(m), codewords_(std::min(k, m) + 1), end_(m) {
        edges_.reserve(m + 2);
    }

    template <class Code>
    double run(const float* values, const double* importance, int64_t m, bool zero, double* codebook, Code* codes) {
        const int64_t n = collapse(values, importance, m);
        const int64_t d = keep_known(n);
        sums(d);
        if (d <= k_) {
            edges_.resize(d + 1);
            for (int64_t i = 0; i <= d; ++i) edges_[i] = static_cast<int32_t>(i);
        } else if (k_ == 1) {
            edges_.assign({0, static_cast<int32_t>(d)});
        } else {
            const double* p = prefix_.data();
            edges_ = search_.best({p, p + d + 1, p + 2 * (d + 1)}, offsets_.data(), d, k_);
        }
        for (int64_t j = 0; j < links(edges_); ++j) codewords_[j] = mean(j);
        if (zero) pin();
        const int64_t count = links(edges_);
        double sse = 0;
        for (int64_t j = 0; j < count; ++j)
            for (int64_t i = edges_[j]; i < edges_[j + 1]; ++i) {
                const double error = known_[i] - codewords_[j];
                sse += mass_[i] * (error * error);
            }
        write(n, count, codes);
        for (int64_t j = 0; j < k_; ++j) codebook[j] = codewords_[std::min(j, count - 1)];
        return sse;
    }

   private:
    // Distinct values by rising value, what each weighs, and where its run of items ends.
    int64_t collapse(const float* values, const double* importance, int64_t m) {
        bool matters = false;
        for (int64_t i = 0; i < m; ++i) {
            const float value = values[i] + 0.0f;  // -0 is 0
            uint32_t bits;
            std::memcpy(&bits, &value, 4);
            bits ^= bits >> 31 ? 0xFFFFFFFFu : 0x80000000u;
            items_[i] = static_cast<uint64_t>(bits) << 32 | static_cast<uint64_t>(i);
            matters |= importance && importance[i] > 0;
        }
        sort_keys(items_, spare_);
        int64_t n = 0;
        for (int64_t i = 0; i < m; ++i) {
            const int64_t index = static_cast<int64_t>(items_[i] & 0xFFFFFFFFu);
            const double h = !matters ? 1.0 : importance[index] > 0 ? importance[index] : 0.0;
            if (!i || items_[i] >> 32 != items_[i - 1] >> 32) {
                distinct_[n] = static_cast<double>(values[index] + 0.0f), weight_[n] = 0;
                ++n;
            }
            weight_[n - 1] += h;
            end_[n - 1] = static_cast<int32_t>(i + 1);
        }
        return n;
    }

    int64_t keep_known(int64_t n) {
        int64_t d = 0;
        for (int64_t i = 0; i < n; ++i)
            if (weight_[i] > 0) known_[d] = distinct_[i], mass_[d] = weight_[i], ++d;
        return d;
    }

    // Prefix sums about the middle value, outwards from it.
    void sums(int64_t d) {
        const int64_t anchor = d / 2;
        double *s0 = prefix_.data(), *s1 = s0 + d + 1, *s2 = s1 + d + 1;
        for (int64_t i = 0; i < d; ++i) offsets_[i] = known_[i] - known_[anchor];
        s0[anchor] = s1[anchor] = s2[anchor] = 0;
        for (int64_t i = anchor; i < d; ++i) {
            const double u = offsets_[i], first = mass_[i] * u;
            s0[i + 1] = s0[i] + mass_[i], s1[i + 1] = s1[i] + first, s2[i + 1] = s2[i] + first * u;
        }
        for (int64_t i = anchor - 1; i >= 0; --i) {
            const double u = offsets_[i], first = mass_[i] * u;
            s0[i] = s0[i + 1] - mass_[i], s1[i] = s1[i + 1] - first, s2[i] = s2[i + 1] - first * u;
        }
    }

    double mean(int64_t j) const {
        const int64_t from = edges_[j], to = edges_[j + 1];
        if (to - from == 1) return known_[from];
        double mass = 0, first = 0;
        for (int64_t i = from; i < to; ++i) mass += mass_[i], first += mass_[i] * known_[i];
        return first / mass;
    }

    // Makes 0 one of the codewords, and the others the means of what is then nearest to them.
    void pin() {
        int64_t count = links(edges_), pinned = 0;
        for (int64_t j = 1; j < count; ++j)
            if (std::abs(codewords_[j]) < std::abs(codewords_[pinned])) pinned = j;
        if (codewords_[pinned] == 0) return;
        if (count < k_) {
            pinned = 0;
            while (pinned < count && codewords_[pinned] < 0) ++pinned;
            for (int64_t j = count++; j > pinned; --j) codewords_[j] = codewords_[j - 1];
        }
        codewords_[pinned] = 0;
        const int32_t d = edges_.back();
        edges_.assign(count + 1, d);
        edges_[0] = 0;
        int32_t at = 0;
        for (int64_t j = 1; j < count; ++j) {
            const double middle = (codewords_[j - 1] + codewords_[j]) / 2;
            while (at < d && known_[at] <= middle) ++at;
            edges_[j] = at;
        }
        for (int64_t j = 0; j < count; ++j)
            if (j != pinned && edges_[j] < edges_[j + 1]) codewords_[j] = mean(j);
    }

    // Codes of all values: what has no weight takes the nearest codeword.
    template <class Code>
    void write(int64_t n, int64_t count, Code* codes) const {
        int64_t item = 0, at = 0, cluster = 0, nearest = 0;
        for (int64_t i = 0; i < n; ++i) {
            int64_t code;
            if (weight_[i] > 0) {
                while (edges_[cluster + 1] <= at) ++cluster;
                ++at;
                code = cluster;
            } else {
                while (nearest + 1 < count && (codewords_[nearest] + codewords_[nearest + 1]) / 2 < distinct_[i])
                    ++nearest;
                code = nearest;
            }
            for (; item < end_[i]; ++item) codes[items_[item] & 0xFFFFFFFFu] = static_cast<Code>(code);
        }
    }

    const int64_t k_;
    Search search_;
    std::vector<uint64_t> items_, spare_;
    std::vector<double> distinct_, weight_, known_, mass_, prefix_, offsets_, codewords_;
    std::vector<int32_t> end_;
    Edges edges_;
};

template <class Code>
void cluster(
    const float* values, const double* importance, int64_t groups, int64_t m, int64_t k, bool zero, int64_t threads,
    double* codebooks, Code* codes, double* sse) {
    cw::parallel(groups, threads, [&](cw::Tasks& tasks) {
        Clustering clustering(m, k);
        for (int64_t g; tasks.take(g);) {
            const double* h = importance ? importance + g * m : nullptr;
            sse[g] = clustering.run(values + g * m, h, m, zero, codebooks + g * k, codes + g * m);
        }
    });
}

}  // namespace

// edges (k+1,) of the best clustering of d items into k intervals, 1 < k < d: values (d,) rising, prefix (3, d+1).
CW_EXPORT int64_t cw_best_edges(const double* prefix, const double* values, int64_t d, int64_t k, int64_t* edges) {
    return cw::guarded([&] {
        Search search(d);
        const Edges& found = search.best({prefix, prefix + d + 1, prefix + 2 * (d + 1)}, values, d, k);
        std::copy(found.begin(), found.end(), edges);
        return int64_t{0};
    });
}

// codebooks (g, k), codes (g, m) of `width` bytes and sse (g,) of values (g, m), weighted by importance (g, m) or null;
// m, k > 0 and m below 2**31.
CW_EXPORT int64_t cw_cluster_groups(
    const float* values, const double* importance, int64_t groups, int64_t m, int64_t k, int64_t zero, int64_t threads,
    double* codebooks, void* codes, int64_t width, double* sse) {
    return cw::guarded([&] {
        if (width == 1)
            cluster(values, importance, groups, m, k, zero, threads, codebooks, static_cast<uint8_t*>(codes), sse);
        else
            cluster(values, importance, groups, m, k, zero, threads, codebooks, static_cast<uint16_t*>(codes), sse);
        return int64_t{0};
    });
}
