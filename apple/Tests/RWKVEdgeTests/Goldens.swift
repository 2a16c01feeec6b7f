import Foundation
import XCTest

@testable import RWKVEdge

/// Where the tests find what they compare with: beside themselves, and in the repository that they are a part of.
enum Goldens {
    static let folder = URL(fileURLWithPath: #filePath).deletingLastPathComponent().appendingPathComponent("Goldens")
    static let repository = folder.deletingLastPathComponent().deletingLastPathComponent().deletingLastPathComponent()
        .deletingLastPathComponent()
    static let world = repository.appendingPathComponent("rwkv_edge/world/rwkv_vocab_v20230424.txt")
    static let demoTokenizer = repository.appendingPathComponent("rwkv_edge/demo/tokenizer.json")

    /// The exported demo bundles: those of `python apple/make_goldens.py`, or of RWKV_EDGE_BUNDLES.
    static var bundles: URL {
        if let given = ProcessInfo.processInfo.environment["RWKV_EDGE_BUNDLES"] {
            return URL(fileURLWithPath: given, isDirectory: true)
        }
        return repository.appendingPathComponent("build/apple-bundles", isDirectory: true)
    }

    static func read<T: Decodable>(_ name: String, as type: T.Type) throws -> T {
        try JSONDecoder().decode(type, from: Data(contentsOf: folder.appendingPathComponent(name)))
    }

    /// A manifest for Core ML of a made-up model: two layers, two heads of two, sixteen tokens.
    static func manifest(
        format: Int = 1, target: String = "coreml", modelID: String = String(repeating: "5", count: 64)
    ) throws -> Manifest {
        try Manifest.decode(Data(json(format: format, target: target, modelID: modelID).utf8))
    }

    /// One package with both layers.
    static let whole = [#""packed": {"name": "rwkv_state", "shape": [2, 8, 2], "first_layer": 0, "rows": \#(rows)}"#]
    static let rows = #"{"att_x": [0, 2], "wkv": [2, 6], "ffn_x": [6, 8]}"#

    /// The text of such a manifest.
    ///
    /// - Parameter parts: what is said of the state of each part
    static func json(
        format: Int = 1, target: String = "coreml", modelID: String = String(repeating: "5", count: 64), state: String = "packed",
        parts: [String] = whole
    ) -> String {
        let tensors = (0..<2).map { layer in
            """
            {"name": "\(layer).att_x", "shape": [4], "dtype": "float32", "first": 0.0, "factor": 1.0},
            {"name": "\(layer).wkv", "shape": [2, 2, 2], "dtype": "float32", "first": -10000.0, "factor": 16.0},
            {"name": "\(layer).ffn_x", "shape": [4], "dtype": "float32", "first": 0, "factor": 1}
            """
        }
        let graphs = [("decode", 1), ("prefill", 16)].flatMap { function, nTokens in
            parts.enumerated().map { i, about in
                let inputs = #"{"name": "tokens", "dtype": "int32", "shape": [\#(nTokens)]}"#
                return """
                    {"file": "model.mlpackage", "function": "\(function)", "role": "\(function)", "part": \(i + 1),
                     "parts": \(parts.count), "target": "\(target)", "profile": "ane", "wkv": "step", "T": \(nTokens),
                     "arithmetic": "float16", "state": "\(state)", "inputs": [\(inputs)],
                     "outputs": [{"name": "logits", "dtype": "float16", "shape": [1, 16]}],
                     \(about.isEmpty ? "" : about + ",") "needs": {"ios": "18.0", "macos": "15.0"}}
                    """
            }
        }
        return """
            {"format": \(format), "model_id": "\(modelID)",
             "spec": {"version": "7", "n_layer": 2, "n_embd": 4, "n_head": 2, "head_size": 2, "n_ffn": 16, "n_vocab": 16},
             "state": [\(tensors.joined(separator: ","))],
             "graphs": [\(graphs.joined(separator: ","))],
             "tensors": {},
             "files": {"model.mlpackage/Manifest.json": {"bytes": 2, "sha256": "\(String(repeating: "0", count: 64))"}},
             "initial_state": null, "tokenizer": null, "prompt": null,
             "sampling": {"temperature": 1.0, "top_k": 0, "top_p": 0.7, "min_p": 0.0, "typical_p": 1.0,
                          "presence_penalty": 0.0, "frequency_penalty": 0.0, "penalty_decay": 0.996},
             "made_by": {"tool": "rwkv-edge", "version": "0.1.0"}}
            """
    }
}

/// Check that an expression throws an `RWKVError` whose sentence has a text in it.
func assertThrows<T>(_ text: String, file: StaticString = #filePath, line: UInt = #line, _ expression: () throws -> T) {
    XCTAssertThrowsError(try expression(), file: file, line: line) { error in
        XCTAssertTrue(error is RWKVError, "\(error)", file: file, line: line)
        XCTAssertTrue(error.localizedDescription.contains(text), error.localizedDescription, file: file, line: line)
    }
}
