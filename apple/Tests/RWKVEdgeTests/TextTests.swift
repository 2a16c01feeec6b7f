import Foundation
import XCTest

@testable import RWKVEdge

final class TextTests: XCTestCase {
    func testCharactersAreNeverSplit() {
        let text = "aé€😀 \u{301}z"
        for size in 1...5 {
            var stream = UTF8Stream()
            var found = ""
            let bytes = Array(text.utf8)
            for start in stride(from: 0, to: bytes.count, by: size) {
                let piece = stream.push(Array(bytes[start..<min(start + size, bytes.count)]))
                XCTAssertFalse(piece.unicodeScalars.contains("\u{FFFD}"))
                found += piece
            }
            XCTAssertEqual(found + stream.finish(), text)
        }
    }

    func testAnUnfinishedCharacterIsHeldBack() {
        var stream = UTF8Stream()
        XCTAssertEqual(stream.push([0xF0, 0x9F, 0x98]), "")
        XCTAssertEqual(stream.pending, [0xF0, 0x9F, 0x98])
        XCTAssertEqual(stream.finish(), "\u{FFFD}")
        XCTAssertEqual(stream.push([0x61]), "a")
    }

    func testBytesThatAreNoCharacterAreNotWaitedFor() {
        for bytes: [UInt8] in [[0xFF], [0x80], [0xC0], [0xC1], [0xE0, 0x80], [0xF0, 0x80], [0xF4, 0x90], [0xF5]] {
            XCTAssertEqual(UTF8Stream.unfinished(bytes), 0, "\(bytes)")
        }
        for (bytes, n): ([UInt8], Int) in [([], 0), ([0x61], 0), ([0xC2], 1), ([0xE2, 0x82], 2), ([0xF4, 0x8F, 0xBF], 3), ([0xC3, 0xA9], 0), ([0xED, 0xA0], 2)] {
            XCTAssertEqual(UTF8Stream.unfinished(bytes), n, "\(bytes)")
        }
    }

    func testStopTexts() throws {
        var stops = try StopTexts(["\n\nUser:", "END"])
        var (text, stopped) = stops.push("Well\n")
        XCTAssertEqual(text, "Well")
        XCTAssertTrue(stops.isHolding)
        (text, stopped) = stops.push("\nUs")
        XCTAssertEqual(text, "")
        (text, stopped) = stops.push("eful. E")
        XCTAssertEqual(text, "\n\nUseful. ")
        XCTAssertFalse(stopped)
        (text, stopped) = stops.push("ND and more")
        XCTAssertEqual(text, "")
        XCTAssertTrue(stopped)
    }

    func testAStopIsFoundBetweenJoinedCharacters() throws {
        var stops = try StopTexts(["\n"])
        let (text, stopped) = stops.push("a\r\nb")  // "\r\n" is one character of Swift
        XCTAssertEqual(Array(text.utf8), Array("a\r".utf8))
        XCTAssertTrue(stopped)
    }

    func testWhatIsHeldBackIsGivenAtTheEnd() throws {
        var stops = try StopTexts(["END"])
        XCTAssertEqual(stops.push("the EN").text, "the ")
        XCTAssertEqual(stops.finish(), "EN")
        XCTAssertFalse(stops.isHolding)
        assertThrows("empty") { try StopTexts(["a", ""]) }
    }
}
