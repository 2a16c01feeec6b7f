import Foundation

/// How a token is chosen. The fields are those of the manifest, and mean what they mean in the Python runtime.
public struct Sampling: Codable, Sendable, Equatable {
    /// 0 takes the most likely token.
    public var temperature: Double
    /// So many most likely tokens stay; 0 for all.
    public var topK: Int
    /// The fewest tokens stay whose probabilities sum to this.
    public var topP: Double
    /// Tokens stay that are at least so likely, as a share of the most likely one.
    public var minP: Double
    /// Only 1, which is none, is known to this package.
    public var typicalP: Double
    /// Taken once from the logit of every token that was generated before.
    public var presencePenalty: Double
    /// Taken from it once more for every time that it was.
    public var frequencyPenalty: Double
    /// What is left of such a time at every further token.
    public var penaltyDecay: Double

    enum CodingKeys: String, CodingKey {
        case temperature
        case topK = "top_k"
        case topP = "top_p"
        case minP = "min_p"
        case typicalP = "typical_p"
        case presencePenalty = "presence_penalty"
        case frequencyPenalty = "frequency_penalty"
        case penaltyDecay = "penalty_decay"
    }

    public init(
        temperature: Double = 1, topK: Int = 0, topP: Double = 1, minP: Double = 0, typicalP: Double = 1,
        presencePenalty: Double = 0, frequencyPenalty: Double = 0, penaltyDecay: Double = 0.996
    ) {
        self.temperature = temperature
        self.topK = topK
        self.topP = topP
        self.minP = minP
        self.typicalP = typicalP
        self.presencePenalty = presencePenalty
        self.frequencyPenalty = frequencyPenalty
        self.penaltyDecay = penaltyDecay
    }

    /// The most likely token, always.
    public static let greedy = Sampling(temperature: 0)

    /// Whether what was generated changes what is generated next.
    var penalizes: Bool { presencePenalty != 0 || frequencyPenalty != 0 }

    func check() throws {
        guard temperature >= 0, temperature.isFinite, topK >= 0, topP > 0, topP <= 1, (0...1).contains(minP), (0...1).contains(penaltyDecay),
            abs(presencePenalty) <= 1e4, abs(frequencyPenalty) <= 1e4
        else {
            throw RWKVError.input("A setting of sampling is out of range.")
        }
        guard typicalP == 1 else {
            throw RWKVError.unsupported("typical_p is not known to this package: set it to 1.")
        }
    }
}

/// A small seedable generator (SplitMix64). Its numbers are not numpy's: a seed gives other tokens than in Python.
struct SplitMix64: RandomNumberGenerator {
    private var state: UInt64

    init(seed: UInt64) {
        state = seed
    }

    mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var z = state
        z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
        return z ^ (z >> 31)
    }

    /// From 0 to just below 1.
    mutating func uniform() -> Double {
        Double(next() >> 11) * 0x1p-53
    }
}

/// Chooses tokens, and remembers what was chosen where penalties need it.
struct Sampler {
    let sampling: Sampling
    private var random: SplitMix64
    /// Token -> how often it was generated, decayed; nil where nothing counts it.
    var occurrences: [Int: Double]?

    /// - Parameters:
    ///   - seed: the same seed gives the same tokens; nil different ones each time
    ///   - occurrences: what was generated before, of a state; it is counted on, penalties or not
    init(_ sampling: Sampling, seed: UInt64?, occurrences: [Int: Double]? = nil) throws {
        try sampling.check()
        self.sampling = sampling
        self.occurrences = occurrences ?? (sampling.penalizes ? [:] : nil)
        random = SplitMix64(seed: seed ?? UInt64.random(in: .min ... .max))
    }

    /// Take a token that was chosen; `text` is what it says, and is only asked for where it counts.
    mutating func add(_ token: Int, text: @autoclosure () -> String) {
        guard var counts = occurrences else { return }
        counts = counts.mapValues { $0 * sampling.penaltyDecay }
        // digits, a space and a tab are seen and not counted, as the rwkv package has it
        let text = text()
        let isUncounted = text.isEmpty || " \t0123456789".contains(text)
        counts[token, default: 0] += isUncounted ? 0 : 1
        occurrences = counts
    }

    /// Choose one of the first `limit` tokens by its logit.
    mutating func choose(_ given: [Float], limit: Int) throws -> Int {
        var logits = Array(given.prefix(limit))
        for (token, count) in occurrences ?? [:] where token < logits.count && sampling.penalizes {
            logits[token] -= Float(sampling.presencePenalty + sampling.frequencyPenalty * count)
        }
        var best = 0
        for i in logits.indices where logits[i] > logits[best] { best = i }
        guard best < logits.count, logits.allSatisfy({ !$0.isNaN }), logits[best].isFinite else {
            throw RWKVError.model("The model gave logits that are not finite.")
        }
        if sampling.temperature == 0 { return best }
        let (ids, logP) = candidates(logits, top: Double(logits[best]))
        let highest = logP.max() ?? 0
        var total = 0.0
        let cumulative = logP.map { p -> Double in
            total += exp((p - highest) / sampling.temperature)
            return total
        }
        let mark = random.uniform() * total
        return ids[cumulative.firstIndex { $0 > mark } ?? ids.count - 1]
    }

    /// The tokens that topK, topP and minP leave, and the logarithms of their probabilities.
    func candidates(_ logits: [Float], top: Double) -> (ids: [Int], logP: [Double]) {
        let z = top + log(logits.reduce(0.0) { $0 + exp(Double($1) - top) })
        func logP(_ ids: [Int]) -> [Double] { ids.map { Double(logits[$0]) - z } }
        if sampling.topK == 0, sampling.topP == 1, sampling.minP == 0 {
            let all = Array(logits.indices)
            return (all, logP(all))
        }
        func sorted(_ ids: [Int]) -> [Int] {
            ids.sorted { logits[$0] == logits[$1] ? $0 < $1 : logits[$0] > logits[$1] }
        }
        // nearly always those within e^-12 of the best are enough, and few: more are sorted only if they are not
        var kept: [Int] = []
        for reach in [12, 24, Double.infinity] {
            kept = sorted(logits.indices.filter { Double(logits[$0]) >= top - reach })
            let (n, isCertain) = nKept(logP(kept))
            kept = Array(kept.prefix(n))
            if isCertain { break }
        }
        return (kept, logP(kept))
    }

    /// How many of the most likely tokens stay, and whether less likely ones than these could not change that.
    ///
    /// `logP` is sorted, the most likely first.
    private func nKept(_ logP: [Double]) -> (n: Int, isCertain: Bool) {
        let p = logP.map { exp($0) }
        var n = p.count
        var isCertain = false
        if sampling.topK > 0, sampling.topK <= n {
            (n, isCertain) = (sampling.topK, true)
        }
        if sampling.topP < 1 {
            var sum = 0.0
            let below = p.prefix { sum += $0; return sum < sampling.topP * (1 - 1e-12) }.count
            if below < p.count { (n, isCertain) = (min(n, below + 1), true) }
        }
        if let highest = p.first, sampling.minP > 0 {
            let likely = p.prefix { $0 >= sampling.minP * (1 - 1e-12) * highest }.count
            // what is further away than e^-12 is less likely than 1e-5 of the best
            if likely < p.count || sampling.minP > 1e-5 { (n, isCertain) = (min(n, likely), true) }
        }
        return (max(n, 1), isCertain)
    }
}
