#if canImport(CoreML)

import CoreML
import Foundation
import XCTest

@testable import RWKVEdge

/// Hold the exported demo against what its file computes, bundle by bundle. Skipped where the bundles are not there.
final class ModelTests: XCTestCase {
    private struct Golden: Decodable {
        struct Step: Decodable {
            let argmax: Int
            let margin: Float
            let logits: [Float]
        }

        struct Tensor: Decodable {
            let shape: [Int]
            let values: [Float]
            let norm: Float
        }

        struct State: Decodable {
            let nTokens: Int
            let tensors: [String: Tensor]

            enum CodingKeys: String, CodingKey {
                case tensors
                case nTokens = "n_tokens"
            }
        }

        let modelID: String
        let prompt: String
        let ids: [Int]
        let deviation: Float
        let steps: [Step]
        let state: State

        enum CodingKeys: String, CodingKey {
            case prompt, ids, deviation, steps, state
            case modelID = "model_id"
        }
    }

    /// Of the logits' standard deviation: float16, in another order of additions than the golden's.
    private static let tolerance: Float = 0.05

    private func open(_ name: String) async throws -> (RWKVModel, Golden) {
        let folder = Goldens.bundles.appendingPathComponent(name, isDirectory: true)
        let file = Goldens.folder.appendingPathComponent("\(name).json")
        guard FileManager.default.fileExists(atPath: folder.path), FileManager.default.fileExists(atPath: file.path) else {
            throw XCTSkip("\(name) was not exported: python apple/make_goldens.py")
        }
        let golden = try Goldens.read("\(name).json", as: Golden.self)
        let model = try await RWKVModel.open(folder, computeUnits: .cpuOnly, verify: true)
        XCTAssertEqual(model.bundle.manifest.modelID, golden.modelID)
        return (model, golden)
    }

    func testANEBundle() async throws { try await check("ane-lut4") }

    func testANEBundleWithPackedState() async throws { try await check("ane-lut4-packed") }

    func testGPUBundle() async throws { try await check("gpu-int4") }

    private func check(_ name: String) async throws {
        let (model, golden) = try await open(name)
        let tokenizer = try XCTUnwrap(model.tokenizer)
        XCTAssertEqual(try tokenizer.encode(golden.prompt), golden.ids)

        var logits = try await model.feed(golden.ids)
        let state = try await model.state()
        XCTAssertEqual(state.nTokens, golden.state.nTokens)
        for (name, expected) in golden.state.tensors {
            let found = try XCTUnwrap(state.tensors[name])
            XCTAssertEqual(found.shape, expected.shape, name)
            let size = max(expected.norm / Float(found.values.count).squareRoot(), 1e-3)  // of an element
            XCTAssertLessThan(Self.difference(found.values, expected.values), 5 * Self.tolerance * size, name)
            let norm = found.values.reduce(0) { $0 + $1 * $1 }.squareRoot()
            XCTAssertEqual(norm, expected.norm, accuracy: Self.tolerance * expected.norm + 1e-3, name)
        }
        // every step goes on with the golden's token, so that one near tie does not make the rest incomparable
        for (i, step) in golden.steps.enumerated() {
            XCTAssertLessThan(Self.difference(logits, step.logits), Self.tolerance * golden.deviation, "step \(i)")
            if step.margin > 2 * Self.tolerance * golden.deviation {
                XCTAssertEqual(logits.indices.max { logits[$0] < logits[$1] }, step.argmax, "step \(i)")
            }
            logits = try await model.feed([step.argmax])
        }

        // back to the prompt, by the state and by a file: the same numbers, for the same program reads the same memory
        let file = FileManager.default.temporaryDirectory.appendingPathComponent("\(UUID().uuidString).state")
        defer { try? FileManager.default.removeItem(at: file) }
        try await model.restore(state)
        let once = try await model.feed([golden.steps[0].argmax])
        try await model.restore(state)
        try await model.save(to: file)
        try await model.reset()
        try await model.restore(from: file)
        let twice = try await model.feed([golden.steps[0].argmax])
        XCTAssertEqual(once, twice)

        // reading by chunks and one by one
        try await model.reset()
        for id in golden.ids { logits = try await model.feed([id]) }
        XCTAssertLessThan(Self.difference(logits, golden.steps[0].logits), Self.tolerance * golden.deviation)
    }

    private static func difference(_ found: [Float], _ expected: [Float]) -> Float {
        zip(found, expected).map { abs($0 - $1) }.max() ?? .infinity
    }

    func testGenerating() async throws {
        let (model, golden) = try await open("ane-lut4")
        var whole = ""
        let all = model.generate(prompt: golden.prompt, maxTokens: 24, sampling: .greedy)
        for try await text in all { whole += text }
        XCTAssertFalse(whole.isEmpty)
        let why = await all.finish
        XCTAssertEqual(why, .length)

        // again, up to a stop that lies within: what was said and what is remembered end before it
        let stop = String(whole.dropFirst(whole.count / 2).prefix(4))
        let cut = try XCTUnwrap(whole.range(of: stop)).lowerBound
        try await model.reset()
        var part = ""
        for try await text in model.generate(prompt: golden.prompt, maxTokens: 24, stop: [stop], sampling: .greedy) { part += text }
        XCTAssertEqual(part, String(whole[..<cut]))

        // a seed repeats
        var told: [String] = []
        for _ in 0..<2 {
            try await model.reset()
            var text = ""
            for try await piece in model.generate(prompt: golden.prompt, maxTokens: 16, seed: 5) { text += piece }
            told.append(text)
        }
        XCTAssertEqual(told[0], told[1])

        // who stops listening ends it, though the text is still there: what was heard is what is remembered
        try await model.reset()
        let broken = model.generate(prompt: golden.prompt, maxTokens: 100_000, sampling: .greedy)
        var heard: [String] = []
        for try await text in broken {
            heard.append(text)
            if heard.count == 3 { break }
        }
        let state = try await model.state()
        XCTAssertEqual(state.nTokens, golden.ids.count + 3)  // here every token is a piece
        XCTAssertTrue(whole.hasPrefix(heard.joined()))
        // it can be gone on with until something else is read
        let fourth = try await broken.next() ?? ""
        XCTAssertTrue(whole.hasPrefix(heard.joined() + fourth))
        _ = try await model.feed([1])
        do {
            _ = try await broken.next()
            XCTFail("the text went on in what was read since")
        } catch {
            XCTAssertTrue(error.localizedDescription.contains("something else"), error.localizedDescription)
        }
        withExtendedLifetime(broken) {}
        try await model.reset()
        for try await _ in model.generate(prompt: "", maxTokens: 1, sampling: .greedy) {}  // from the token that begins a text
        let begun = try await model.state()
        XCTAssertEqual(begun.nTokens, 2)
    }

    func testStatesGoBetweenLayouts() async throws {
        let (explicit, golden) = try await open("ane-lut4")
        let (packed, _) = try await open("ane-lut4-packed")
        _ = try await explicit.feed(golden.ids)
        let state = try await explicit.state()
        try await packed.restore(state)
        let again = try await packed.state()
        XCTAssertEqual(again, state)
    }

    func testTokensOutOfRangeAreRefused() async throws {
        let (model, _) = try await open("gpu-int4")
        do {
            _ = try await model.feed([model.bundle.manifest.spec.nVocab])
            XCTFail("a token out of range was read")
        } catch {
            XCTAssertTrue(error.localizedDescription.contains("outside the vocabulary"), error.localizedDescription)
        }
    }
}

#endif
