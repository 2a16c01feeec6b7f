import Foundation
import XCTest

@testable import RWKVEdge

final class StateTests: XCTestCase {
    private struct Golden: Decodable {
        struct Tensor: Decodable {
            let shape: [Int]
            let values: [Float]
        }

        let nTokens: Int
        let tensors: [String: Tensor]

        enum CodingKeys: String, CodingKey {
            case tensors
            case nTokens = "n_tokens"
        }
    }

    private let file = Goldens.folder.appendingPathComponent("half.state")

    func testAStateOfThePythonRuntimeIsRead() throws {
        let golden = try Goldens.read("half.json", as: Golden.self)
        let state = try SavedState(contentsOf: file, manifest: Goldens.manifest())
        XCTAssertEqual(state.nTokens, golden.nTokens)
        XCTAssertEqual(state.logits, golden.tensors["logits"]?.values)
        XCTAssertEqual(state.tensors.count + 1, golden.tensors.count)
        for (name, tensor) in state.tensors {
            XCTAssertEqual(tensor.shape, golden.tensors[name]?.shape)
            XCTAssertEqual(tensor.values, golden.tensors[name]?.values)
        }
    }

    func testAStateRoundTrips() throws {
        let state = try SavedState(contentsOf: file, manifest: Goldens.manifest())
        let again = try SavedState(state.encoded(), manifest: Goldens.manifest(), name: "again")
        XCTAssertEqual(again, state)
    }

    func testWhatAStateKnowsOfItsTextRoundTrips() throws {
        let manifest = try Goldens.manifest()
        let old = try SavedState(contentsOf: file, manifest: manifest)
        XCTAssertEqual(old.recent, [])
        XCTAssertNil(old.tokenizer)
        XCTAssertNil(old.occurrences)
        let state = SavedState(
            modelID: old.modelID, nTokens: 12, tensors: old.tensors, logits: old.logits, recent: [3, 0, 15],
            tokenizer: String(repeating: "0aF9", count: 16).lowercased(), occurrences: [4: 0.5, 2: 1])
        let again = try SavedState(state.encoded(), manifest: manifest, name: "again")
        XCTAssertEqual(again, state)
        let outside = SavedState(modelID: old.modelID, nTokens: 12, tensors: old.tensors, logits: nil, recent: [16], tokenizer: state.tokenizer)
        assertThrows("damaged") { try SavedState(outside.encoded(), manifest: manifest, name: "outside") }
    }

    func testOnlyAStateFileIsReplaced() throws {
        let state = try SavedState(contentsOf: file, manifest: Goldens.manifest())
        let folder = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        defer { try? FileManager.default.removeItem(at: folder) }
        let target = folder.appendingPathComponent("story.state")
        try state.write(to: target)
        try state.write(to: target)
        XCTAssertEqual(try SavedState(contentsOf: target, manifest: Goldens.manifest()), state)
        let other = folder.appendingPathComponent("weights.safetensors")
        try Safetensors(tensors: [:], metadata: ["format": "pt"]).encoded().write(to: other)
        try Data("my notes".utf8).write(to: folder.appendingPathComponent("notes.txt"))
        for name in ["weights.safetensors", "notes.txt", ""] {
            assertThrows("no state file") { try state.write(to: folder.appendingPathComponent(name)) }
        }
        XCTAssertEqual(try Data(contentsOf: folder.appendingPathComponent("notes.txt")), Data("my notes".utf8))
    }

    func testAnotherModelsStateIsRefused() throws {
        let other = try Goldens.manifest(modelID: String(repeating: "6", count: 64))
        assertThrows("another model") { try SavedState(contentsOf: file, manifest: other) }
    }

    func testDamagedStatesAreRefused() throws {
        let manifest = try Goldens.manifest()
        let data = try Data(contentsOf: file)
        for length in [0, 7, 8, 100, data.count - 1] {
            assertThrows("damaged") { try SavedState(data.prefix(length), manifest: manifest, name: "short") }
        }
        var flipped = data
        flipped[data.count - 1] ^= 1
        assertThrows("damaged") { try SavedState(flipped, manifest: manifest, name: "flipped") }
        assertThrows("missing") { try SavedState(contentsOf: file.appendingPathExtension("not"), manifest: manifest) }
    }

    func testTheFirstState() throws {
        let manifest = try Goldens.manifest()
        let state = SavedState(firstOf: manifest)
        XCTAssertNoThrow(try state.check(manifest))
        XCTAssertEqual(state.tensors["1.wkv"]?.values, [Float](repeating: -10000, count: 8))
        XCTAssertEqual(state.tensors["1.ffn_x"]?.values, [0, 0, 0, 0])
        XCTAssertEqual(state.nTokens, 0)
    }

    func testSafetensors() throws {
        let tensors = [
            "b": Safetensors.Tensor(dtype: "F32", shape: [2, 1], data: Data(floats: [1.5, -2])),
            "a": Safetensors.Tensor(dtype: "F16", shape: [1], data: Data([0x00, 0x3C])),
        ]
        let file = try Safetensors(tensors: tensors, metadata: ["key": "value \"quoted\""]).encoded()
        let read = try XCTUnwrap(Safetensors(file))
        XCTAssertEqual(read.tensors, tensors)
        XCTAssertEqual(read.metadata, ["key": "value \"quoted\""])
        XCTAssertEqual(read.tensors["a"]?.data.halves, [1])
        XCTAssertEqual(read.tensors["b"]?.data.floats, [1.5, -2])
        XCTAssertEqual(file.first.map { (Int($0) + 8) % 8 }, 0)  // the data begin at a multiple of 8
        for n in 0..<file.count { XCTAssertNil(Safetensors(file.prefix(n))) }
    }
}
