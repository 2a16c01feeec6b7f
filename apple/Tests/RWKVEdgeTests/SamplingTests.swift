import Foundation
import XCTest

@testable import RWKVEdge

final class SamplingTests: XCTestCase {
    private let logits: [Float] = [0, 3, 1, 3, 2, -1]

    func testGreedyTakesTheFirstOfTheBest() throws {
        var sampler = try Sampler(.greedy, seed: nil)
        XCTAssertEqual(try sampler.choose(logits, limit: 6), 1)
        XCTAssertEqual(try sampler.choose(logits, limit: 1), 0)
    }

    func testASeedRepeats() throws {
        var one = try Sampler(Sampling(), seed: 7)
        var two = try Sampler(Sampling(), seed: 7)
        let first = try (0..<50).map { _ in try one.choose(logits, limit: 6) }
        let second = try (0..<50).map { _ in try two.choose(logits, limit: 6) }
        XCTAssertEqual(first, second)
        XCTAssertGreaterThan(Set(first).count, 2)
    }

    func testFrequenciesAreTheProbabilities() throws {
        var sampler = try Sampler(Sampling(temperature: 1), seed: 1)
        var counts = [Double](repeating: 0, count: 6)
        for _ in 0..<20_000 {
            let token = try sampler.choose(logits, limit: 6)
            counts[token] += 1
        }
        let weights = logits.map { exp(Double($0)) }
        let total = weights.reduce(0, +)
        for i in 0..<6 { XCTAssertEqual(counts[i] / 20_000, weights[i] / total, accuracy: 0.015) }
    }

    func testWhatIsLeftOut() throws {
        XCTAssertEqual(try seen(Sampling(topK: 1)), [1])
        XCTAssertEqual(try seen(Sampling(topK: 3)), [1, 3, 4])
        XCTAssertEqual(try seen(Sampling(topP: 0.5)), [1, 3])  // 0.39 each
        XCTAssertEqual(try seen(Sampling(topP: 1e-9)), [1])
        XCTAssertEqual(try seen(Sampling(minP: 0.3)), [1, 3, 4])  // e^-1 of the best stays, e^-2 does not
    }

    private func seen(_ sampling: Sampling) throws -> Set<Int> {
        var sampler = try Sampler(sampling, seed: 3)
        return try Set((0..<500).map { _ in try sampler.choose(logits, limit: 6) })
    }

    func testUnlikelyTokensAreFoundWhereTheyAreNeeded() throws {
        // more than e^12 apart: the short list of likely tokens does not suffice
        var sampler = try Sampler(Sampling(temperature: 100, topK: 3), seed: 3)
        let far: [Float] = [20, 0, -20, -40]
        XCTAssertEqual(try Set((0..<500).map { _ in try sampler.choose(far, limit: 4) }), [0, 1, 2])
    }

    func testTheShortListIsThatOfAllLogits() throws {
        var random = SplitMix64(seed: 5)
        for spread in [1.0, 10, 100] {
            let logits = (0..<300).map { _ in Float(spread * random.uniform()) }
            let order = logits.indices.sorted { logits[$0] > logits[$1] }
            let top = Double(logits[order[0]])
            let total = logits.reduce(0) { $0 + exp(Double($1) - top) }
            let p = order.map { exp(Double(logits[$0]) - top) / total }
            for sampling in [
                Sampling(topK: 1), Sampling(topK: 40), Sampling(topK: 1000), Sampling(topP: 0.3), Sampling(topP: 0.999_999), Sampling(minP: 0.05),
                Sampling(minP: 1e-9), Sampling(topK: 50, topP: 0.9), Sampling(topK: 5, topP: 0.999_999_999, minP: 1e-30),
            ] {
                var n = sampling.topK > 0 ? min(sampling.topK, p.count) : p.count
                if sampling.topP < 1 {
                    var sum = 0.0
                    n = min(n, 1 + p.prefix { sum += $0; return sum < sampling.topP }.count)
                }
                n = min(n, p.prefix { $0 >= sampling.minP * p[0] }.count)
                let found = try Sampler(sampling, seed: 1).candidates(logits, top: top)
                XCTAssertEqual(found.ids, Array(order.prefix(n)), "\(sampling) \(spread)")
                for (one, other) in zip(found.logP, p) { XCTAssertEqual(one, log(other), accuracy: 1e-6) }
            }
        }
    }

    func testTheTextOfATokenIsOnlyAskedForByPenalties() throws {
        var sampler = try Sampler(Sampling(), seed: nil)
        sampler.add(1, text: { XCTFail("it was asked for"); return "" }())
    }

    func testPenalties() throws {
        var sampler = try Sampler(Sampling(temperature: 0, presencePenalty: 0.5, frequencyPenalty: 1), seed: nil)
        XCTAssertEqual(try sampler.choose(logits, limit: 6), 1)
        sampler.add(1, text: "word")
        XCTAssertEqual(try sampler.choose(logits, limit: 6), 3)
        sampler.add(3, text: "7")  // digits are seen, not counted: 2.5, still before 2
        XCTAssertEqual(try sampler.choose(logits, limit: 6), 3)
    }

    func testPenaltiesGoOnCounting() throws {
        let sampling = Sampling(temperature: 0, presencePenalty: 0.5, frequencyPenalty: 1, penaltyDecay: 0.5)
        var whole = try Sampler(sampling, seed: nil)
        whole.add(1, text: "word")
        var later = try Sampler(sampling, seed: nil, occurrences: whole.occurrences)
        for token in [3, 1] {
            whole.add(token, text: "word")
            later.add(token, text: "word")
        }
        XCTAssertEqual(later.occurrences, [1: 1.25, 3: 0.5])
        XCTAssertEqual(whole.occurrences, later.occurrences)
    }

    func testWhatCannotBeIsRefused() {
        assertThrows("out of range") { try Sampler(Sampling(temperature: -1), seed: nil) }
        assertThrows("out of range") { try Sampler(Sampling(topP: 0), seed: nil) }
        assertThrows("typical_p") { try Sampler(Sampling(typicalP: 0.5), seed: nil) }
        for wrong: [Float] in [[.nan, 1], [1, .nan], [.infinity, 1], [-.infinity, -.infinity], []] {
            assertThrows("not finite") { () throws -> Int in
                var sampler = try Sampler(Sampling(), seed: nil)
                return try sampler.choose(wrong, limit: 6)
            }
        }
    }
}
