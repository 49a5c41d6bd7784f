// The gradient of a plane: its three sums over a tile, and dx from them.

// What is known of a thread's planes: the saved (or running) statistics, and the affine weight.
struct Statistics {
    Math mean[P], rstd[P], weight[P];

    template <class Share>
    __device__ Statistics(const Share& share, const Math* mean_, const Math* rstd_, const void* weight_, int wide,
                          long long channels) {
        #pragma unroll
        for (int p = 0; p < P; p++) {
            const long long c = share.c + p;
            const bool exists = c < channels;
            mean[p] = exists ? load(mean_ + share.n * channels + c) : 0;
            rstd[p] = exists ? load(rstd_ + share.n * channels + c) : 0;
            weight[p] = weight_ && exists ? load_parameter(weight_, wide & WIDE_WEIGHT, c) : 1;
        }
    }
};

// sums: P times sum(dy), then P times sum(dy * c), then P times sum(c), where c = x - mean.
template <int OWNER, int REST, int THREADS, int CHUNKS, class Share>
__device__ inline void gradient_sums(const Share& share, const Tensor& x, const Tensor& dy,
                                     Rest<REST, THREADS, CHUNKS>& rest_x, Rest<REST, THREADS, CHUNKS>& rest_dy,
                                     int chunks, const Statistics& stat, Math (&sums)[3 * P], Math* scratch) {
    Math s_dy[V] = {}, s_dyc[V] = {}, s_c[V] = {};
    const auto add_one = [&](int v, Storage x_, Storage dy_) {
        const Math c = widen(x_) - stat.mean[plane_of(v)], g = widen(dy_);
        s_dy[v] += g;
        s_dyc[v] += g * c;
        s_c[v] += c;
    };
    const auto add = [&](int k) {
        if (!share.holds(k)) return;
        const Pack a = rest_x.get(k), b = rest_dy.get(k);
        #pragma unroll
        for (int v = 0; v < V; v++) add_one(v, a.v[v], b.v[v]);
    };
    if (REST == REGISTERS) {
        rest_x.read(share, x, 0);
        rest_dy.read(share, dy, 0);
        rest_x.each(CHUNKS, add);
    } else {
        for (int from = 0; from < chunks; from += rest_x.batch) {
            rest_x.read(share, x, from);
            rest_dy.read(share, dy, from);
            #pragma unroll
            for (int i = 0; i < rest_x.batch; i++) add(from + i);
        }
    }
    if (Share::edges && share.edge >= 0) add_one(0, rest_x.edge, rest_dy.edge);
    fold(s_dy, sums);
    fold(s_dyc, sums + P);
    fold(s_c, sums + 2 * P);
    sum_over_owner<OWNER, THREADS>(sums, share.lanes, scratch);
}

struct Gradient {
    Math sum_dy[P], sum_dy_xhat[P], mean_dy[P], mean_dy_xhat[P], delta[P];

    __device__ void set(int p, Math sum_dy_, Math sum_dy_xhat_, Math delta_, Math count) {
        sum_dy[p] = sum_dy_;
        sum_dy_xhat[p] = sum_dy_xhat_;
        mean_dy[p] = sum_dy_ / count;
        mean_dy_xhat[p] = sum_dy_xhat_ / count;
        delta[p] = delta_;
    }

    __device__ Math dx(int p, Math x, Math dy, const Statistics& stat) const {
        const Math xhat = ((x - stat.mean[p]) - delta[p]) * stat.rstd[p];
        return ((dy - mean_dy[p]) - xhat * mean_dy_xhat[p]) * (stat.weight[p] * stat.rstd[p]);
    }
};
