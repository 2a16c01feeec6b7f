import Foundation
import XCTest

@testable import RWKVEdge

final class ManifestTests: XCTestCase {
    func testFields() throws {
        let manifest = try Goldens.manifest()
        XCTAssertEqual(manifest.spec.version, "7")
        XCTAssertEqual(manifest.spec.nVocab, 16)
        XCTAssertEqual(manifest.state.count, 6)
        XCTAssertEqual(manifest.state[1], Manifest.StateTensor(name: "0.wkv", shape: [2, 2, 2], first: -10000, factor: 16))
        XCTAssertEqual(manifest.graphs.map(\.function), ["decode", "prefill"])
        XCTAssertEqual(manifest.graphs.map(\.nTokens), [1, 16])
        XCTAssertEqual(manifest.graphs[0].packed?.rows["wkv"], [2, 6])
        XCTAssertEqual(manifest.graphs[0].inputs, [Manifest.Value(name: "tokens", dtype: "int32", shape: [1])])
        XCTAssertEqual(manifest.sampling.topP, 0.7)
        XCTAssertNil(manifest.tokenizer)
        XCTAssertNil(manifest.initialState)
        XCTAssertNil(manifest.prompt)
    }

    func testWhatCannotBeReadIsRefused() {
        assertThrows("format 2") { try Goldens.manifest(format: 2) }
        assertThrows("exported for onnx") { try Goldens.manifest(target: "onnx") }
        assertThrows("damaged") { try Manifest.decode(Data("{}".utf8)) }
        assertThrows("damaged") { try Manifest.decode(Data("nothing".utf8)) }
        assertThrows("damaged") { try Manifest.decode(Data(#"{"format": 1, "graphs": []}"#.utf8)) }
        // a newer format is named as such, whatever else it holds
        assertThrows("update the app") { try Manifest.decode(Data(#"{"format": 3}"#.utf8)) }
    }

    func testAFolderWithoutAManifestIsNoBundle() {
        assertThrows("no manifest.json") { try ModelBundle(folder: FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)) }
    }

    func testChatTemplate() throws {
        let json = #"""
            {"system": "System: {}\n\n", "user": "User: {}\n\n", "assistant": "Assistant:", "turn_end": "\n\n",
             "stop": ["\n\nUser:"], "think": {"none": {"opening": "", "sampling": null}, "fast": {"opening": " <think>\n</think", "sampling": null}}}
            """#
        let template = try JSONDecoder().decode(ChatTemplate.self, from: Data(json.utf8))
        XCTAssertEqual(try template.turn("Hi\n\n there ", isFirst: true), "User: Hi\nthere\n\nAssistant:")
        XCTAssertEqual(try template.turn("Hi", isFirst: false), "\n\nUser: Hi\n\nAssistant:")
        XCTAssertEqual(
            try template.turn("Hi", system: "Be kind.", isFirst: true, thinking: "fast"),
            "System: Be kind.\n\nUser: Hi\n\nAssistant: <think>\n</think")
        assertThrows("unknown") { try template.turn("Hi", isFirst: true, thinking: "slowly") }
    }
}
